//! A log in a schema of its own, in the server that the tests share.

use async_trait::async_trait;
use postrider_core::{
    EventLog, Mailbox, Message, Topic,
    clock::{Clock, SystemClock},
    log::{
        Claim, Claimed, EventLogStore as _, LogSchema as _, NewRecord, Outcome, Owner, Record, Session, SessionOptions,
        SettleReport, Settled,
    },
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{log::LogFixture, server::Postgres};
use sqlx::{AssertSqlSafe, SqlSafeStr as _};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

pub(crate) struct PostgresFixture {
    pub(crate) log: PostgresLog,
    pub(crate) options: PostgresOptions,
    /// How far the log's clock has been moved.
    ahead: Mutex<Duration>,
}

impl PostgresFixture {
    pub(crate) async fn new() -> Self {
        Self::with(PostgresOptions::default().with_schema(Postgres::shared().fresh_name())).await
    }

    pub(crate) async fn with(options: PostgresOptions) -> Self {
        let log = connect(&options).await;
        log.migrate().await.unwrap();
        Self {
            log,
            options,
            ahead: Mutex::default(),
        }
    }

    pub(crate) async fn handle(&self) -> PostgresLog {
        connect(&self.options).await
    }

    /// One number.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(self.fill(sql)).into_sql_str();
        sqlx::query_scalar(sql).fetch_one(self.log.pool()).await.unwrap()
    }

    pub(crate) async fn sql(&self, sql: &str) {
        sqlx::raw_sql(AssertSqlSafe(self.fill(sql)).into_sql_str())
            .execute(self.log.pool())
            .await
            .unwrap();
    }

    /// `{name}` becomes the table of that name.
    pub(crate) fn fill(&self, sql: &str) -> String {
        let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
        let mut text = String::new();
        for (n, part) in sql.split('{').enumerate() {
            match part.split_once('}') {
                Some((name, rest))
                    if n > 0 && !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') =>
                {
                    text += &format!(
                        "{}.{}{rest}",
                        quoted(&self.options.schema),
                        quoted(&format!("{}{name}", self.options.prefix))
                    );
                }
                _ if n > 0 => text += &format!("{{{part}"),
                _ => text += part,
            }
        }
        text
    }

    /// Moves the log's clock, which every handle and session then has.
    pub(crate) async fn jump(&self, duration: Duration) {
        let ahead = {
            let mut ahead = self.ahead.lock().unwrap();
            *ahead += duration;
            *ahead
        };
        self.set_ahead(ahead).await;
    }

    /// Moves the log's clock to this far from the server's.
    pub(crate) async fn set_ahead(&self, ahead: Duration) {
        self.sql(&format!(
            "CREATE OR REPLACE FUNCTION {{clock}}() RETURNS timestamptz LANGUAGE sql VOLATILE AS \
             'SELECT pg_catalog.clock_timestamp() + interval ''{} milliseconds'''",
            ahead.as_millis()
        ))
        .await;
    }
}

async fn connect(options: &PostgresOptions) -> PostgresLog {
    let options = options.clone().with_max_connections(4);
    PostgresLog::connect_with(&Postgres::shared().url(), options)
        .await
        .unwrap()
}

#[async_trait]
impl LogFixture for PostgresFixture {
    fn log(&self) -> EventLog {
        self.log.clone().into()
    }
    async fn other(&self) -> EventLog {
        self.handle().await.into()
    }
    fn clock(&self) -> Arc<dyn Clock> {
        SystemClock::shared()
    }
    /// Steps about as long as the suite's short lease pass for real, so that it is renewed or not as in life. What is
    /// longer is jumped, with a moment for a renewal to notice; so are the many small steps of random histories.
    async fn advance(&self, duration: Duration) {
        let millis = duration.as_millis();
        if millis < 100 || (1000..2000).contains(&millis) {
            tokio::time::sleep(duration).await;
        } else {
            self.jump(duration).await;
        }
        if millis >= 2000 {
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
    }
}

pub(crate) fn options(lease: Duration) -> SessionOptions {
    SessionOptions::new(Owner::new()).with_lease(lease)
}

pub(crate) const LONG: Duration = Duration::from_secs(600);

/// A session on the outbox, as a relay has it.
pub(crate) async fn open(log: &PostgresLog, options: SessionOptions) -> Box<dyn Session> {
    log.open(&Mailbox::outbox(), &options).await.unwrap()
}

pub(crate) fn record(key: Option<&str>, name: &str) -> NewRecord {
    let message = Message::new(Topic::new("t"), "t.v1", name.to_owned()).with_source("test");
    NewRecord::new(match key {
        Some(key) => message.with_key(key),
        None => message,
    })
}

pub(crate) fn names(records: &[Record]) -> Vec<String> {
    let name = |record: &Record| String::from_utf8_lossy(record.message.payload()).into_owned();
    records.iter().map(name).collect()
}

pub(crate) async fn claim(session: &dyn Session) -> Claimed {
    session.claim(&Claim::new(1000)).await.unwrap()
}

pub(crate) async fn done(session: &dyn Session, records: &[Record]) -> SettleReport {
    let done = |record: &Record| Settled {
        tag: record.tag,
        outcome: Outcome::Done,
    };
    session
        .settle(&records.iter().map(done).collect::<Vec<_>>())
        .await
        .unwrap()
}

/// Claims and finishes until nothing more comes.
pub(crate) async fn drain(session: &dyn Session) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let records = claim(session).await.records;
        if records.is_empty() {
            return all;
        }
        done(session, &records).await;
        all.extend(names(&records));
    }
}
