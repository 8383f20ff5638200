//! Events in transactions of the application's.

use crate::fixture::{LONG, PostgresFixture, drain, open, options, record};
use async_trait::async_trait;
use postrider_core::{
    Bus, ErrorKind, Event, Mailbox, Message, Outcomes, Publisher, Reachability, Transport,
    log::{Lent, Placement, TransactionalLog as _},
    memory::MemoryTransport,
};
use postrider_testkit::run;
use sqlx::{Connection as _, PgConnection};

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "placed", key = "id", crate = "postrider_core")]
struct Placed {
    id: i64,
}

fn bus(fixture: &PostgresFixture) -> Bus {
    Bus::builder()
        .log(fixture.log.clone())
        .transport(MemoryTransport::new())
        .build()
        .unwrap()
}

#[test]
fn events_go_with_the_transaction_they_were_published_in() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let bus = bus(&fixture);
        let session = open(&fixture.log, options(LONG)).await;
        let mut tx = fixture.log.pool().begin().await.unwrap();
        bus.publish_in(&mut tx, &Placed { id: 1 }).await.unwrap();
        bus.publish_all_in(&mut tx, &[Placed { id: 1 }, Placed { id: 2 }])
            .await
            .unwrap();
        assert!(drain(&*session).await.is_empty(), "not before its commit");
        tx.commit().await.unwrap();
        assert_eq!(drain(&*session).await.len(), 3);
        let mut tx = fixture.log.pool().begin().await.unwrap();
        bus.publish_in(&mut tx, &Placed { id: 3 }).await.unwrap();
        tx.rollback().await.unwrap();
        assert!(drain(&*session).await.is_empty());
        // A savepoint is a transaction too.
        let mut tx = fixture.log.pool().begin().await.unwrap();
        let mut inner = tx.begin().await.unwrap();
        bus.publish_in(&mut inner, &Placed { id: 4 }).await.unwrap();
        inner.rollback().await.unwrap();
        bus.publish_in(&mut tx, &Placed { id: 5 }).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(drain(&*session).await, [r#"{"id":5}"#]);
    });
}

#[test]
fn a_connection_has_to_be_in_a_transaction() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let bus = bus(&fixture);
        let mut connection = fixture.log.pool().acquire().await.unwrap().detach();
        let error = bus.publish_in(&mut connection, &Placed { id: 1 }).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongTransaction);
        assert!(error.to_string().contains("begin one with"), "{error}");
        // One that the driver does not know of is one all the same.
        sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
        bus.publish_in(&mut connection, &Placed { id: 2 }).await.unwrap();
        sqlx::raw_sql("COMMIT").execute(&mut connection).await.unwrap();
        let session = open(&fixture.log, options(LONG)).await;
        assert_eq!(drain(&*session).await, [r#"{"id":2}"#]);
        connection.close().await.unwrap();
    });
}

#[test]
fn a_swallowed_error_cannot_be_committed_as_success() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let bus = bus(&fixture);
        for with_event in [false, true] {
            let mut tx = bus.begin().await.unwrap();
            sqlx::query("CREATE TEMP TABLE swallowed (n int)")
                .execute(tx.connection::<PgConnection>().unwrap())
                .await
                .unwrap();
            let failed = sqlx::query("SELECT 1 / 0")
                .execute(tx.connection::<PgConnection>().unwrap())
                .await;
            assert!(failed.is_err());
            if with_event {
                bus.publish_in(&mut tx, &Placed { id: 1 }).await.unwrap();
            }
            let error = tx.commit().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WrongTransaction, "{error}");
            assert!(error.to_string().contains("nothing of it can be committed"), "{error}");
        }
        assert_eq!(fixture.number("SELECT count(*) FROM {event}").await, 0);
        // Nothing is left behind in the pool.
        let mut tx = bus.begin().await.unwrap();
        sqlx::query("SELECT 1")
            .execute(tx.connection::<PgConnection>().unwrap())
            .await
            .unwrap();
        bus.publish_in(&mut tx, &Placed { id: 2 }).await.unwrap();
        tx.commit().await.unwrap();
        assert_eq!(fixture.number("SELECT count(*) FROM {event}").await, 1);
    });
}

/// A broker that says what it was sent.
#[derive(Debug)]
struct Told(tokio::sync::mpsc::UnboundedSender<Message>);

#[async_trait]
impl Publisher for Told {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        batch.iter().for_each(|message| {
            let _ = self.0.send(message.clone());
        });
        outcomes.report_rest(Ok(()));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

#[test]
fn a_bus_carries_events_of_every_way_to_publish() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let transport = Transport::new("told", postrider_core::Capabilities::default()).with_publisher(Told(tell));
        let bus = Bus::builder()
            .log(fixture.log.clone())
            .transport(transport)
            .source("test")
            .build()
            .unwrap();
        bus.migrate().await.unwrap();
        bus.start().await.unwrap();
        bus.publish(&Placed { id: 1 }).await.unwrap();
        let mut tx = bus.begin().await.unwrap();
        bus.publish_in(&mut tx, &Placed { id: 2 }).await.unwrap();
        tx.commit().await.unwrap();
        let mut tx = fixture.log.pool().begin().await.unwrap();
        bus.publish_in(&mut tx, &Placed { id: 3 }).await.unwrap();
        tx.commit().await.unwrap();
        bus.publish_after(&Placed { id: 4 }, std::time::Duration::from_millis(300))
            .await
            .unwrap();
        let mut got = Vec::new();
        while got.len() < 4 {
            got.push(String::from_utf8(told.recv().await.unwrap().payload().to_vec()).unwrap());
        }
        assert_eq!(got, [r#"{"id":1}"#, r#"{"id":2}"#, r#"{"id":3}"#, r#"{"id":4}"#]);
        bus.shutdown(std::time::Duration::from_secs(5)).await.unwrap();
        assert_eq!(
            fixture
                .number("SELECT count(*) FROM {lane} WHERE owner IS NOT NULL")
                .await,
            0
        );
        assert_eq!(fixture.number("SELECT count(*) FROM {relay}").await, 0);
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 4);
    });
}

/// Whoever parks has to see what those did who parked and settled before him.
#[test]
fn parking_asks_for_read_committed() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let parked = record(Some("k"), "1").placed(Placement::Parked {
            after: std::time::Duration::ZERO,
            attempts: 1,
            errors: Vec::new(),
        });
        let mut tx = fixture
            .log
            .pool()
            .begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ")
            .await
            .unwrap();
        let lent = Lent::exclusive::<PgConnection>(&mut tx);
        let error = fixture
            .log
            .append_in(lent, &Mailbox::outbox(), &[parked])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongTransaction, "{error}");
        drop(tx);
        // Events themselves may be published at any isolation.
        let mut tx = fixture
            .log
            .pool()
            .begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE")
            .await
            .unwrap();
        bus(&fixture).publish_in(&mut tx, &Placed { id: 1 }).await.unwrap();
        tx.commit().await.unwrap();
        let session = open(&fixture.log, options(LONG)).await;
        assert_eq!(drain(&*session).await.len(), 1);
    });
}
