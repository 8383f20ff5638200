//! The tables, by version. A version once released is never changed.

use crate::{error::doing, sql::Names};
use postrider_core::{Error, ErrorKind, Result};
use sqlx::{Connection as _, SqliteConnection};

/// The versions, oldest first: each takes the schema from the one before to its own.
const VERSIONS: [&str; 1] = [include_str!("schema/v1.sql")];

/// Brings the schema to this version. Safe on several processes at once: the first one does it.
pub(crate) async fn migrate(connection: &mut SqliteConnection, names: &Names) -> Result<()> {
    let failed = doing("migrating the event log");
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
    let meta =
        names.fill("CREATE TABLE IF NOT EXISTS {meta} (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID");
    sqlx::raw_sql(meta).execute(&mut *tx).await.map_err(&failed)?;
    let read = names.fill("SELECT value FROM {meta} WHERE name = 'schema_version'");
    let found: Option<i64> = sqlx::query_scalar(read)
        .fetch_optional(&mut *tx)
        .await
        .map_err(&failed)?;
    let found = usize::try_from(found.unwrap_or(0)).unwrap_or(0);
    if found > VERSIONS.len() {
        return Err(Error::new(
            ErrorKind::Storage,
            "the event log's tables are of a newer version than this program knows: update the program",
        )
        .with("found", found)
        .with("known", VERSIONS.len()));
    }
    if found == VERSIONS.len() {
        return tx.rollback().await.map_err(&failed);
    }
    for version in &VERSIONS[found..] {
        sqlx::raw_sql(names.fill(version))
            .execute(&mut *tx)
            .await
            .map_err(&failed)?;
    }
    let write = names.fill(
        "INSERT INTO {meta} (name, value) VALUES ('schema_version', ?1) ON CONFLICT (name) DO UPDATE SET value = ?1",
    );
    sqlx::query(write)
        .bind(i64::try_from(VERSIONS.len()).unwrap_or(i64::MAX))
        .execute(&mut *tx)
        .await
        .map_err(&failed)?;
    tx.commit().await.map_err(failed)
}
