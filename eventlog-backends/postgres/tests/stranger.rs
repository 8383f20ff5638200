//! A stranger's log: Postgres through another driver, tokio-postgres, in its own crate. It appends in that driver's
//! transactions, with the `append` function that the migration installs, and leaves everything else to ours.

use async_trait::async_trait;
use postrider_core::{
    Bus, Error, ErrorKind, Event, EventLog, Mailbox, Result,
    log::{
        Lent, LogCapabilities, LogTransaction, NewRecord, Owner, Placement, SessionOptions, TransactionOf,
        TransactionalLog,
    },
    memory::MemoryTransport,
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{run, server::Postgres};
use tokio_postgres::{Client, NoTls, Transaction};

/// What the stranger calls its log.
#[derive(Debug, Clone)]
struct TheirLog {
    schema: String,
}

/// The stranger's own name for the driver's transaction: the orphan rule allows the trait on it.
struct TheirTransaction<'a>(Transaction<'a>);

impl TransactionOf<TheirLog> for TheirTransaction<'_> {
    fn lend(&mut self) -> Lent<'_> {
        Lent::shared::<Client>(self.0.client())
    }
}

#[async_trait]
impl TransactionalLog for TheirLog {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        Err(Error::new(
            ErrorKind::Unsupported,
            "begin a transaction with the driver, and use `publish_in`",
        ))
    }

    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let client: &Client = tx.get_ref()?;
        let Mailbox::Outbox(route) = mailbox else {
            return Err(Error::new(ErrorKind::Unsupported, "only outboxes"));
        };
        let append = format!(
            "SELECT \"{}\".append($1, $2, $3::bytea, $4, $5::text::jsonb, clock_timestamp() + make_interval(secs => $6), $7, $8, $9::text::uuid, route => $10)",
            self.schema
        );
        for record in batch {
            let (message, after) = match &record.placement {
                Placement::Due => (&record.message, 0.0),
                Placement::Scheduled { after } => (&record.message, after.as_secs_f64()),
                _ => return Err(Error::new(ErrorKind::Unsupported, "an outbox parks nothing on arrival")),
            };
            let headers = serde_json::to_string(message.headers())
                .map_err(|e| Error::new(ErrorKind::Invalid, "headers").because(e))?;
            client
                .execute(
                    &append,
                    &[
                        &message.topic().as_str(),
                        &message.kind(),
                        &&message.payload()[..],
                        &message.key(),
                        &headers,
                        &after,
                        &message.content_type(),
                        &message.source(),
                        &message.id().to_string(),
                        &route.to_string(),
                    ],
                )
                .await
                .map_err(|e| Error::new(ErrorKind::Unavailable, "appending with tokio-postgres").because(e))?;
        }
        Ok(())
    }
}

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "placed", key = "id", crate = "postrider_core")]
struct Placed {
    id: i64,
}

#[test]
#[allow(clippy::unwrap_used)]
fn a_stranger_adds_a_driver() {
    run(async {
        let options = PostgresOptions::default().with_schema(Postgres::shared().fresh_name());
        let ours = PostgresLog::connect_with(&Postgres::shared().url(), options.clone())
            .await
            .unwrap();
        let theirs = TheirLog { schema: options.schema };
        let log = EventLog::new("theirs", ours.clone(), LogCapabilities::all())
            .with_transactions(theirs)
            .with_schema(ours);
        let bus = Bus::builder()
            .log(log.clone())
            .transport(MemoryTransport::new())
            .source("stranger")
            .build()
            .unwrap();
        bus.migrate().await.unwrap();
        let (mut client, connection) = tokio_postgres::connect(&Postgres::shared().url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        for (id, commits) in [(1, true), (2, false), (3, true)] {
            let mut tx = TheirTransaction(client.transaction().await.unwrap());
            bus.publish_in(&mut tx, &Placed { id }).await.unwrap();
            if commits {
                tx.0.commit().await.unwrap();
            }
        }
        let session = SessionOptions::new(Owner::new());
        let session = log.store().open(&Mailbox::outbox(), &session).await.unwrap();
        let claimed = session.claim(&postrider_core::log::Claim::new(10)).await.unwrap();
        let mut keys: Vec<_> = claimed
            .records
            .iter()
            .map(|r| r.message.key().unwrap().to_owned())
            .collect();
        keys.sort();
        assert_eq!(keys, ["1", "3"]);
        assert_eq!(claimed.records[0].message.source(), Some("stranger"));
    });
}
