//! The tables, by version. A version once released is never changed.

use crate::{
    PostgresOptions,
    error::{code, doing},
    sql::{Names, quoted},
};
use postrider_core::{Error, ErrorKind, Result};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _, SqlSafeStr as _};
use std::collections::HashMap;

struct Version {
    sql: &'static str,
    /// The oldest program that may go on running on this schema: a rolling deploy migrates first.
    oldest_reader: i64,
}

/// The versions, oldest first: each takes the schema from the one before to its own.
const VERSIONS: [Version; 1] = [Version {
    sql: include_str!("schema/v1.sql"),
    oldest_reader: 1,
}];

/// The version this program is written for.
pub(crate) const CURRENT: i64 = VERSIONS.len() as i64;

/// The SQL that takes a schema of version `from` to this program's: to be read, and run, by a person.
pub(crate) fn migration(names: &Names, from: i64) -> String {
    let from = usize::try_from(from).unwrap_or(0);
    let mut sql = String::from("BEGIN;\n");
    if from == 0 {
        sql += &names.fill("CREATE SCHEMA IF NOT EXISTS {schema};\n");
    }
    for version in VERSIONS.iter().skip(from) {
        sql += &names.fill(version.sql);
    }
    let oldest = VERSIONS.last().map_or(1, |version| version.oldest_reader);
    let write = format!(
        "\nINSERT INTO {{settings}} VALUES ('schema_version', {CURRENT}), ('oldest_reader', {oldest}) ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value;\nCOMMIT;\n"
    );
    sql + &names.fill(&write)
}

/// What a role needs at run time. A service that only appends, in whatever language, needs the last two lines.
pub(crate) fn grants(names: &Names, role: &str) -> String {
    let role = quoted(role);
    let done: Vec<String> = (0..16).map(|slot| format!("{{done_{slot}}}")).collect();
    let done = done.join(", ");
    let append = |payload| {
        format!(
            "{{append}}(text, text, {payload}, text, jsonb, timestamptz, text, text, uuid, timestamptz, text, jsonb)"
        )
    };
    let functions = ["bytea", "text", "json", "jsonb"].map(append).join(", ");
    names.fill(&format!(
        "GRANT SELECT, INSERT, UPDATE, DELETE ON {{mailbox}}, {{lane}}, {{relay}}, {{event}}, {{parked}}, {{scheduled}}, {{done}}, {{receipt}}, {{note}}, {{member}} TO {role};\n\
         GRANT SELECT, UPDATE ON {{settings}} TO {role};\n\
         GRANT SELECT, TRUNCATE ON {done} TO {role};\n\
         GRANT SELECT, USAGE, UPDATE ON SEQUENCE {{position}} TO {role};\n\
         GRANT USAGE ON SCHEMA {{schema}} TO {role};\n\
         GRANT EXECUTE ON FUNCTION {functions} TO {role};\n"
    ))
}

/// What the schema says of itself; empty if there is none.
async fn settings(connection: &mut PgConnection, names: &Names) -> Result<HashMap<String, i64>> {
    let read = names.fill("SELECT name, value FROM {settings}");
    match sqlx::query(AssertSqlSafe(read).into_sql_str())
        .persistent(false)
        .fetch_all(connection)
        .await
    {
        Ok(rows) => Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect()),
        Err(error) if matches!(code(&error).as_deref(), Some("42P01" | "3F000")) => Ok(HashMap::new()),
        Err(error) => Err(doing("reading the version of the event log's tables")(error)),
    }
}

/// Whether this program can work with the schema as it is.
///
/// # Errors
/// [`ErrorKind::Storage`] that says which version was found, and what to do.
pub(crate) async fn check(connection: &mut PgConnection, names: &Names, options: &PostgresOptions) -> Result<()> {
    let settings = settings(connection, names).await?;
    let found = settings.get("schema_version").copied().unwrap_or(0);
    let error = |text: &'static str| {
        let error = Error::new(ErrorKind::Storage, text).with("schema", &options.schema);
        Err(error.with("found version", found).with("known version", CURRENT))
    };
    match found {
        0 => error(
            "the event log's tables are missing in this database: run `bus.migrate()`, or the SQL of `migration_sql()`",
        ),
        older if older < CURRENT => error(
            "the event log's tables are of an older version: run `bus.migrate()`, or the SQL of `migration_sql()`, before this program",
        ),
        newer if newer > CURRENT && settings.get("oldest_reader").copied().unwrap_or(newer) > CURRENT => error(
            "the event log's tables are of a newer version, which this program cannot work with: update the program",
        ),
        _ => Ok(()),
    }
}

/// Brings the schema to this version. Safe on several processes at once: the first one does it, the others wait.
pub(crate) async fn migrate(connection: &mut PgConnection, names: &Names) -> Result<()> {
    let failed = |error: sqlx::Error| {
        let lacks_right = code(&error).as_deref() == Some("42501");
        let error = doing("migrating the event log")(error);
        if lacks_right {
            let says = "the Postgres role may not create the event log's tables: let an administrator run the SQL of `migration_sql()`, and then that of `grants_sql(role)`";
            Error::new(ErrorKind::Config, says).because(error)
        } else {
            error
        }
    };
    let mut tx = connection.begin().await.map_err(failed)?;
    let lock = "SELECT pg_advisory_xact_lock(hashtext('postrider migrate'), hashtext($1))";
    let lock = sqlx::query(lock).persistent(false).bind(names.schema());
    lock.execute(&mut *tx).await.map_err(failed)?;
    // In a savepoint, since the tables may be missing.
    let mut look = tx.begin().await.map_err(failed)?;
    let found = settings(&mut look, names)
        .await?
        .get("schema_version")
        .copied()
        .unwrap_or(0);
    look.rollback().await.map_err(failed)?;
    if found >= CURRENT {
        return tx.rollback().await.map_err(failed);
    }
    if found == 0 {
        let encoding: String = sqlx::query_scalar("SHOW server_encoding")
            .persistent(false)
            .fetch_one(&mut *tx)
            .await
            .map_err(failed)?;
        if encoding != "UTF8" {
            let text = "the event log needs a Postgres database in UTF8";
            return Err(Error::new(ErrorKind::Config, text).with("encoding", encoding));
        }
    }
    let sql = migration(names, found);
    let sql = sql
        .trim_start_matches("BEGIN;\n")
        .trim_end_matches("COMMIT;\n")
        .to_owned();
    sqlx::raw_sql(AssertSqlSafe(sql).into_sql_str())
        .execute(&mut *tx)
        .await
        .map_err(failed)?;
    tx.commit().await.map_err(failed)
}
