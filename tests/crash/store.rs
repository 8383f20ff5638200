//! The databases it is tried on: the log, and a table of the numbers that were committed.

use crate::child::Counted;
use postrider::{Bus, EventLog, sqlite::SqliteOptions};
use sqlx::{PgPool, SqlitePool};
use std::{collections::BTreeSet, path::Path, time::Duration};

/// Which database, and how a child process is told.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// A file in the test's directory.
    Sqlite,
    /// The server at this address.
    Postgres(String),
}

impl Place {
    pub(crate) fn parse(text: &str) -> Self {
        match text {
            "sqlite" => Self::Sqlite,
            url => Self::Postgres(url.to_owned()),
        }
    }
    pub(crate) fn to_text(&self) -> &str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres(url) => url,
        }
    }
}

pub(crate) enum Store {
    Sqlite(postrider::sqlite::SqliteLog),
    Postgres(postrider::postgres::PostgresLog),
}

impl Store {
    pub(crate) async fn open(dir: &Path, place: &Place) -> anyhow::Result<Self> {
        match place {
            Place::Sqlite => {
                let options = SqliteOptions::default().with_max_connections(2);
                let log = postrider::sqlite::SqliteLog::open_with(dir.join("shop.db"), options).await?;
                let table =
                    "CREATE TABLE IF NOT EXISTS ledger (key INTEGER, n INTEGER, PRIMARY KEY (key, n)) WITHOUT ROWID";
                sqlx::raw_sql(table).execute(log.pool()).await?;
                Ok(Self::Sqlite(log))
            }
            Place::Postgres(url) => {
                let options = postrider::postgres::PostgresOptions::default().with_max_connections(3);
                let log = postrider::postgres::PostgresLog::connect_with(url, options).await?;
                EventLog::from(log.clone())
                    .schema()
                    .expect("it has tables")
                    .migrate()
                    .await?;
                let table = "CREATE TABLE IF NOT EXISTS ledger (key bigint, n bigint, PRIMARY KEY (key, n)); \
                     CREATE TABLE IF NOT EXISTS keys (key bigint PRIMARY KEY, n bigint NOT NULL)";
                // Two at once may both find it missing.
                let _ = sqlx::raw_sql(table).execute(log.pool()).await;
                Ok(Self::Postgres(log))
            }
        }
    }

    pub(crate) fn log(&self) -> EventLog {
        match self {
            Self::Sqlite(log) => log.clone().into(),
            Self::Postgres(log) => log.clone().into(),
        }
    }

    /// One transaction on a key: the next number in the ledger's table, and its event. Some are rolled back, and their
    /// numbers are used again, by negative ones that must never be seen.
    pub(crate) async fn count(&self, bus: &Bus, key: i64, round: u64) -> anyhow::Result<()> {
        match self {
            Self::Sqlite(log) => count_in_sqlite(bus, log.pool(), key, round).await,
            Self::Postgres(log) => count_in_postgres(bus, log.pool(), key, round).await,
        }
    }

    /// How many events are still to be sent.
    pub(crate) async fn pending(&self) -> u64 {
        let admin = self.log().admin().expect("it can be asked").clone();
        let mut stats = admin.stats().await.unwrap();
        stats.remove(&postrider::Mailbox::outbox()).unwrap_or_default().pending
    }

    /// What was committed.
    pub(crate) async fn committed(&self) -> BTreeSet<(i64, i64)> {
        const SQL: &str = "SELECT key, n FROM ledger";
        let rows: Vec<(i64, i64)> = match self {
            Self::Sqlite(log) => sqlx::query_as(SQL).fetch_all(log.pool()).await.unwrap(),
            Self::Postgres(log) => sqlx::query_as(SQL).fetch_all(log.pool()).await.unwrap(),
        };
        rows.into_iter().collect()
    }
}

fn rolls_back(round: u64) -> bool {
    round.is_multiple_of(5)
}

async fn count_in_sqlite(bus: &Bus, pool: &SqlitePool, key: i64, round: u64) -> anyhow::Result<()> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let n: i64 = sqlx::query_scalar("SELECT coalesce(max(n), 0) + 1 FROM ledger WHERE key = ?")
        .bind(key)
        .fetch_one(&mut *tx)
        .await?;
    let n = if rolls_back(round) { -n } else { n };
    sqlx::query("INSERT INTO ledger VALUES (?, ?)")
        .bind(key)
        .bind(n)
        .execute(&mut *tx)
        .await?;
    bus.publish_in(&mut tx, &Counted { key, n }).await?;
    if rolls_back(round) {
        tx.rollback().await?;
    } else {
        tx.commit().await?;
    }
    Ok(())
}

async fn count_in_postgres(bus: &Bus, pool: &PgPool, key: i64, round: u64) -> anyhow::Result<()> {
    let mut tx = pool.begin().await?;
    // The row of the key is locked before the event is appended, as an update of an aggregate does.
    let n: i64 = sqlx::query_scalar(
        "INSERT INTO keys VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = keys.n + 1 RETURNING n",
    )
    .bind(key)
    .fetch_one(&mut *tx)
    .await?;
    let n = if rolls_back(round) { -n } else { n };
    sqlx::query("INSERT INTO ledger VALUES ($1, $2)")
        .bind(key)
        .bind(n)
        .execute(&mut *tx)
        .await?;
    bus.publish_in(&mut tx, &Counted { key, n }).await?;
    if round.is_multiple_of(3) {
        // Ids are not in the order of commits.
        tokio::time::sleep(Duration::from_millis(round % 11)).await;
    }
    if rolls_back(round) {
        tx.rollback().await?;
    } else {
        tx.commit().await?;
    }
    Ok(())
}
