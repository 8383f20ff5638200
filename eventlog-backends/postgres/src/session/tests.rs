//! What a claim and a settle touch, counted in buffers: dead rows and wrong statistics must not matter.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::{PostgresOptions, log::PostgresLog};
use postrider_core::{
    Mailbox,
    log::{EventLogStore as _, LogSchema as _, Outcome, Owner},
};
use postrider_testkit::{run_within, server::Postgres};
use sqlx::{AssertSqlSafe, Postgres as Db, Row as _, SqlSafeStr as _, SqlStr, postgres::PgArguments, query::Query};

/// There is much to be written, and the machine may have other things to do.
const LIMIT: Duration = Duration::from_secs(240);

struct Bench {
    log: PostgresLog,
    session: PostgresSession,
}

impl Bench {
    async fn new() -> Self {
        let options = PostgresOptions::default().with_schema(Postgres::shared().fresh_name());
        let log = PostgresLog::connect_with(&Postgres::shared().url(), options)
            .await
            .unwrap();
        log.migrate().await.unwrap();
        let options = SessionOptions::new(Owner::new())
            .with_lease(Duration::from_secs(600))
            .with_keep_succeeded(false);
        log.open(&Mailbox::outbox(), &options).await.unwrap();
        let connection = log.own_connection(Role::Claim).await.unwrap();
        let session = PostgresSession::new(log.clone(), postrider_core::Mailbox::outbox(), 1, options, connection);
        session.claim(&Claim::new(1)).await.unwrap();
        Self { log, session }
    }

    async fn sql(&self, sql: &str) {
        let sql = self.log.names().fill(sql);
        sqlx::raw_sql(AssertSqlSafe(sql))
            .execute(self.log.pool())
            .await
            .unwrap();
    }

    /// Rows that are due at once, in one of the three tables.
    async fn fill(&self, table: &str, count: usize) {
        let (columns, values) = match table {
            "event" => ("", ""),
            "scheduled" => (", due_at", ", {clock}()"),
            _ => (
                ", id, created_at, attempts, state, next_at, errors",
                ", nextval({position'}), now(), 1, 0, {clock}(), '[]'",
            ),
        };
        self.sql(&format!(
            "INSERT INTO {{{table}}} (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload{columns}) \
             SELECT 1, {{lane_of}}(NULL, m), m, 't', 't.v1', 's', NULL, 'c', '[]', now(), convert_to(repeat('x', 100), 'UTF8'){values} \
             FROM (SELECT gen_random_uuid() AS m FROM generate_series(1, {count})) g"
        ))
        .await;
    }

    async fn drain(&self) -> usize {
        let mut all = 0;
        loop {
            let records = self.session.claim(&Claim::new(4000)).await.unwrap().records;
            if records.is_empty() {
                return all;
            }
            all += records.len();
            let done: Vec<_> = records
                .iter()
                .map(|r| Settled {
                    tag: r.tag,
                    outcome: Outcome::Done,
                })
                .collect();
            assert!(self.session.settle(&done).await.unwrap().lost.is_empty());
        }
    }

    /// The buffers that a statement of the session touches, on a connection as it has.
    async fn buffers(
        &self,
        role: Role,
        statement: &SqlStr,
        bind: impl for<'q> Fn(Query<'q, Db, PgArguments>) -> Query<'q, Db, PgArguments>,
    ) -> i64 {
        let mut connection = self.log.own_connection(role).await.unwrap();
        Self::buffers_on(&mut connection, statement, bind).await
    }

    async fn buffers_on(
        connection: &mut sqlx::PgConnection,
        statement: &SqlStr,
        bind: impl for<'q> Fn(Query<'q, Db, PgArguments>) -> Query<'q, Db, PgArguments>,
    ) -> i64 {
        sqlx::raw_sql("BEGIN").execute(&mut *connection).await.unwrap();
        let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {}", statement.as_str());
        let row = bind(sqlx::query(AssertSqlSafe(explain).into_sql_str()))
            .fetch_one(connection)
            .await
            .unwrap();
        let plan: serde_json::Value = serde_json::from_str(row.get_unchecked::<&str, _>(0)).unwrap();
        let buffers = |what: &str| plan[0]["Plan"][what].as_i64().unwrap();
        buffers("Shared Hit Blocks") + buffers("Shared Read Blocks")
    }

    /// What a claim with nothing to give touches: events, parked and scheduled.
    async fn idle_claim(&self, from_the_beginning: bool) -> [i64; 2] {
        let outlook = self.session.shared.outlook();
        let (lanes, mut cursors): (Vec<i16>, Vec<i64>) = outlook.cursors.iter().copied().unzip();
        let (mut parked, mut scheduled) = (outlook.parked_from, outlook.scheduled_from);
        if from_the_beginning {
            cursors.fill(0);
            (parked, scheduled) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        }
        let sql = self.log.sql();
        let (lanes_again, mailbox) = (lanes.clone(), 1_i16);
        let events = self
            .buffers(Role::Claim, &sql.fetch, |q| {
                q.bind(mailbox)
                    .bind(lanes.clone())
                    .bind(cursors.clone())
                    .bind(16_i64)
                    .bind(1000_i64)
            })
            .await;
        let due = self
            .buffers(Role::Claim, &sql.next_due, |q| {
                q.bind(mailbox)
                    .bind(lanes_again.clone())
                    .bind(parked)
                    .bind(scheduled)
                    .bind(Vec::<i64>::new())
            })
            .await;
        [events, due]
    }
}

/// Somebody has forgotten a transaction, so nothing that is deleted can be vacuumed away, or even be skipped by an index.
#[test]
fn dead_rows_beside_a_held_snapshot_are_not_looked_at() {
    run_within(LIMIT, async {
        let bench = Bench::new().await;
        let fresh = bench.idle_claim(false).await;
        let mut held = bench.log.pool().acquire().await.unwrap().detach();
        let look = bench
            .log
            .names()
            .fill("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM {event}");
        sqlx::raw_sql(AssertSqlSafe(look)).execute(&mut held).await.unwrap();
        for table in ["event", "parked", "scheduled"] {
            for _ in 0..5 {
                bench.fill(table, 40_000).await;
                assert_eq!(bench.drain().await, 40_000, "{table}");
            }
        }
        for _ in 0..3 {
            // Looks come after settles, and not at every claim.
            tokio::time::sleep(Duration::from_millis(300)).await;
            bench.drain().await;
        }
        let after = bench.idle_claim(false).await;
        let from_the_beginning = bench.idle_claim(true).await;
        println!(
            "buffers of an idle claim: fresh {fresh:?}, after 600 k rows {after:?}, without a floor {from_the_beginning:?}"
        );
        // Indexes have grown by a level or two: three or four pages for each of the 64 lanes.
        assert!(after[0] < 64 * 6 && after[1] < 2 * 64 * 6, "{after:?}");
        assert!(
            from_the_beginning[0] > after[0] * 10 && from_the_beginning[1] > after[1] * 10,
            "this would not show it: {from_the_beginning:?}"
        );
        drop(held);
    });
}

/// A transaction that has appended and stays open holds back the floor, so what came since is read again and again; what
/// came before it is not.
#[test]
fn an_open_appender_costs_only_what_came_since() {
    run_within(LIMIT, async {
        let bench = Bench::new().await;
        bench.fill("event", 60_000).await;
        bench.drain().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        bench.drain().await;
        let mut open = bench.log.pool().acquire().await.unwrap().detach();
        let append = bench
            .log
            .names()
            .fill("BEGIN; SELECT {append}('t', 't.v1', '\"late\"')");
        sqlx::raw_sql(AssertSqlSafe(append)).execute(&mut open).await.unwrap();
        bench.fill("event", 2000).await;
        assert_eq!(bench.drain().await, 2000);
        tokio::time::sleep(Duration::from_millis(300)).await;
        bench.drain().await;
        let [events, _] = bench.idle_claim(false).await;
        assert!(events < 64 * 6 + 2000 * 2, "{events} buffers");
        sqlx::raw_sql("COMMIT").execute(&mut open).await.unwrap();
        assert_eq!(bench.drain().await, 1);
    });
}

/// Who admits or looks does so on a connection of the application's, whose own plans follow the statistics.
#[test]
fn an_admission_does_not_read_what_was_handled_before() {
    run_within(LIMIT, async {
        for analyzed in ["when empty", "when full", "never"] {
            let bench = Bench::new().await;
            if analyzed == "when empty" {
                bench.sql("ANALYZE {receipt}; ANALYZE {parked}").await;
            }
            bench
                .sql("INSERT INTO {receipt} SELECT 1, gen_random_uuid(), {clock}() FROM generate_series(1, 100000)")
                .await;
            bench.fill("parked", 20_000).await;
            if analyzed == "when full" {
                bench.sql("ANALYZE {receipt}; ANALYZE {parked}").await;
            }
            let sql = bench.log.sql();
            for (name, statement) in [("look", &sql.look), ("admit", &sql.admit)] {
                let mut plain = bench.log.pool().acquire().await.unwrap().detach();
                let ids: Vec<uuid::Uuid> = (0..20).map(|_| *postrider_core::MessageId::new().as_uuid()).collect();
                let mut buffers = 0;
                // The first call plans, and reads the catalogue for it.
                for _ in 0..2 {
                    buffers = Bench::buffers_on(&mut plain, statement, |q| {
                        let q = q.bind("outbox:default").bind(ids.clone());
                        let q = q.bind(vec!["t"; 20]).bind(vec![Some("k"); 20]);
                        if name == "admit" { q.bind(vec![false; 20]) } else { q }
                    })
                    .await;
                    sqlx::raw_sql("ROLLBACK").execute(&mut plain).await.unwrap();
                }
                println!("analyzed {analyzed}, {name}: {buffers} buffers for 20 messages");
                assert!(buffers < 20 * 40, "analyzed {analyzed}: {buffers} buffers");
            }
        }
    });
}

#[test]
fn plans_do_not_depend_on_statistics() {
    run_within(LIMIT, async {
        for analyzed in ["when empty", "when full", "never"] {
            let bench = Bench::new().await;
            if analyzed == "when empty" {
                // A queue's normal state, just when an outage begins.
                bench.fill("event", 20_000).await;
                bench.drain().await;
                bench.sql("VACUUM {event}").await;
                bench.sql("ANALYZE {event}").await;
            }
            bench.fill("event", 100_000).await;
            if analyzed == "when full" {
                bench.sql("ANALYZE {event}").await;
            }
            let records = bench.session.claim(&Claim::new(1000)).await.unwrap().records;
            assert_eq!(records.len(), 1000);
            let sql = bench.log.sql();
            let (lanes, cursors): (Vec<i16>, Vec<i64>) = bench.session.shared.outlook().cursors.into_iter().unzip();
            let fetch = bench
                .buffers(Role::Claim, &sql.fetch, |q| {
                    q.bind(1_i16)
                        .bind(lanes.clone())
                        .bind(cursors.clone())
                        .bind(16_i64)
                        .bind(1000_i64)
                })
                .await;
            let (owner, fence, places, tids) = {
                let held = bench.session.shared.held();
                let out = |tag| {
                    let (_, lane, id) = untag(tag);
                    (lane, id, held.lanes[&lane].records[&id].at.unwrap())
                };
                let out: Vec<_> = records.iter().map(|record| out(record.tag)).collect();
                let places: (Vec<i16>, Vec<i64>) = out.iter().map(|(lane, id, _)| (*lane, *id)).unzip();
                (
                    held.owner,
                    held.fence(),
                    places,
                    out.iter().map(|(.., at)| *at).collect::<Vec<_>>(),
                )
            };
            let mut touched = Vec::new();
            for (statement, is_moved) in [
                (&sql.delete_done, false),
                (&sql.delete_done_moved, true),
                (&sql.keep_done, false),
            ] {
                let buffers = bench
                    .buffers(Role::Settle, statement, |q| {
                        let q = q
                            .bind(1_i16)
                            .bind(owner)
                            .bind(fence.0.clone())
                            .bind(fence.1.clone())
                            .bind(places.1.clone());
                        if is_moved {
                            q.bind(places.0.clone())
                        } else {
                            q.bind(tids.clone())
                        }
                    })
                    .await;
                touched.push(buffers);
            }
            let park = bench
                .buffers(Role::Settle, &sql.park_behind, |q| {
                    q.bind(1_i16).bind(places.0.clone()).bind(places.1.clone())
                })
                .await;
            touched.push(park);
            println!("analyzed {analyzed}: fetch of 1000 {fetch}, settles of 1000 {touched:?}");
            assert!(fetch < 64 * 6 + 1000 * 2, "analyzed {analyzed}: fetch {fetch}");
            // Each a few pages, of the table and of the indexes it goes into; the whole of it has many thousands.
            assert!(
                touched[0] < 1000 * 3 && touched[1..].iter().all(|n| *n < 1000 * 25),
                "analyzed {analyzed}: {touched:?}"
            );
        }
    });
}

#[test]
fn events_of_mailboxes_that_do_not_exist_are_found() {
    run_within(LIMIT, async {
        let bench = Bench::new().await;
        let mut connection = bench.log.own_connection(Role::Claim).await.unwrap();
        bench.fill("event", 10).await;
        assert_eq!(
            bench.log.unknown_mailboxes(&mut connection).await.unwrap(),
            [] as [i16; 0]
        );
        bench
            .sql("UPDATE {event} SET mailbox = 99 WHERE lane = (SELECT min(lane) FROM {event})")
            .await;
        assert_eq!(bench.log.unknown_mailboxes(&mut connection).await.unwrap(), [99]);
    });
}
