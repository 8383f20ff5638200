//! Postrider's event log on PostgreSQL.
//!
//! ```no_run
//! # async fn f() -> postrider_core::Result<()> {
//! use postrider_core::log::LogSchema as _;
//! use postrider_postgres::PostgresLog;
//! let log = PostgresLog::connect("postgres://shop@localhost/shop").await?;
//! log.migrate().await?; // `bus.migrate()`, or by an administrator: see below
//! let pool = log.pool(); // your own tables live in the same database, so one transaction covers both
//! # Ok(()) }
//! ```
//!
//! # How it works
//! - A mailbox has 64 *lanes*. A key has one lane, a lane has one owner at a time, so order per key comes by
//!   construction. A relay's session keeps one lease, a row that it renews; its lanes are its own while that row lives. Lanes
//!   of the dead are taken at once by whoever looks first, those handed back are spread evenly over the living. The
//!   server's clock decides. Every settle is fenced by owner and epoch.
//! - A claim is a plain read of the session's lanes in order; nothing is written for it. What succeeded is deleted, or moved
//!   to the history. What was refused, and what comes behind it of its key, moves to the table `parked`; what is delayed
//!   waits in `scheduled`. So the hot table holds only what is due.
//! - Ids are handed out before their transactions commit, so a later one may become visible first. Reading begins behind
//!   a *settled floor*: the last id that was handed out at some time whose writers are all gone since (by `pg_locks`:
//!   an `INSERT` takes its lock on the table before its id). It skips dead rows, and provably no living one. The
//!   floor, and everything else that is known of the tables, is forgotten with the connection, since a crash of the server takes
//!   back ids that it had handed out.
//! - Relays' connections are told not to trust statistics, and each question has one index that can answer it: a queue is
//!   empty when it is analyzed, and full when it matters.
//! - A relay settles with `synchronous_commit = off`: a crash of the *server* may take back settles of the last moments, which
//!   are then repeats. Your own commits are as durable as you have them.
//!
//! # Connections
//! Your transactions and those of handlers (`bus.begin`, `Transactional`) use the pool. Everything that the log commits by itself
//! (`bus.publish`, parking, dead letters, notes, administration) goes over a second pool of its own, of as many connections at most, which
//! are opened when needed and closed when idle for a minute. A relay has connections of its own: one to claim and one to settle for each
//! mailbox, and one for all leases and looks of the process, so that no lease waits for a pool. With one outbox that is three.
//!
//! The second pool is there because of what a cancelled `BEGIN` does to a pool (sqlx 0.9.0, launchbadge/sqlx#4385). If the future of
//! `pool.begin()` is dropped while the `BEGIN` is on its way, as when the client of an HTTP handler disconnects, the connection goes back
//! with a transaction open on the server. The next statement on it that runs without a transaction of its own answers `Ok`, and is rolled
//! back when the connection closes. The log is safe from that, on [`on_pool`](PostgresLog::on_pool) too; your own statements are safe if
//! the pool checks what comes back, as the pool of [`connect`](PostgresLog::connect) does: see [`is_idle`].
//!
//! They need sessions: behind PgBouncer give relays a pool in session mode, or the server itself. Any pool needs
//! `ignore_startup_parameters = extra_float_digits`, which sqlx sends (tried with 1.18 in session mode: all tests of this
//! crate pass). In transaction mode sqlx's prepared statements need PgBouncer 1.21 or later with `max_prepared_statements`;
//! before that, publishing fails with `prepared statement already exists`.
//!
//! # Tables and rights
//! `migrate` makes the schema; [`PostgresLog::migration_sql`] prints it, for an administrator to read and run, and
//! [`PostgresLog::grants_sql`] what a role needs at run time, which creates and drops nothing. Migrations take turns. A
//! program refuses tables of an older version and says what to run; tables of a newer one it uses if that version says it
//! may (`oldest_reader`), so that a rolling deploy migrates first.
//!
//! # Events from other languages
//! `append` takes a topic, a type and a payload (`jsonb`, `text` or `bytea`), and by name a `key`, `headers` (an object, or an array of
//! pairs), `not_before`, `content_type`, `source`, `id`, `time` and `route`. It checks what Rust checks, runs with the rights of its
//! owner, and returns the event's id. In Python, with psycopg:
//!
//! ```python
//! with conn.transaction():
//!     conn.execute("UPDATE account SET balance = balance - %s WHERE id = %s", (amount, account))
//!     conn.execute("SELECT postrider.append('payments', 'payment.made.v1', %s::jsonb, key => %s)",
//!                  (json.dumps({"account": account, "amount": amount}), str(account)))
//! ```
//!
//! In Go, with pgx:
//!
//! ```go
//! err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
//!     if _, err := tx.Exec(ctx, "UPDATE account SET balance = balance - $1 WHERE id = $2", amount, account); err != nil {
//!         return err
//!     }
//!     _, err := tx.Exec(ctx, "SELECT postrider.append('payments', 'payment.made.v1', $1::jsonb, key => $2)", payload, account)
//!     return err
//! })
//! ```
//!
//! Whoever writes rows itself puts a key into the lane `first byte of md5(key in UTF-8) mod 64`, and an event without a key into that
//! of the 16 bytes of its id:
//!
//! | key | lane | | key | lane |
//! |---|---|---|---|---|
//! | `a` | 12 | | `ä` | 4 |
//! | `order-1` | 46 | | `🦀` | 12 |
//! | `order-2` | 24 | | `日本` | 13 |
//! | `ada` | 12 | | 512 × `k` | 12 |
//! | a space | 50 | | none, id `00000000-0000-0000-0000-000000000000` | 10 |

mod admin;
mod append;
mod config;
mod error;
mod inbox;
mod log;
mod members;
mod own;
mod purge;
mod row;
mod schema;
mod session;
mod sql;
mod tid;
mod transaction;
mod watch;

pub use config::PostgresOptions;
pub use log::PostgresLog;
pub use own::is_idle;
