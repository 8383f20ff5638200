//! Appending in the caller's transaction.

use crate::{PostgresLog, error::doing};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, Mailbox, Result,
    log::{Lent, LogTransaction, NewRecord, Savepoint, TransactionOf, TransactionalLog},
};
use sqlx::{Connection as _, PgConnection, Postgres, Transaction};

impl TransactionOf<PostgresLog> for Transaction<'_, Postgres> {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive::<PgConnection>(&mut **self)
    }
}

/// A plain connection has to be in a transaction, which is checked when something is appended.
impl TransactionOf<PostgresLog> for PgConnection {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive(self)
    }
}

#[derive(Debug)]
struct PostgresTransaction(Transaction<'static, Postgres>);

#[async_trait]
impl LogTransaction for PostgresTransaction {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive::<PgConnection>(&mut *self.0)
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        // In a transaction that has failed COMMIT answers ROLLBACK, which the driver takes for success. This does not.
        let sound = sqlx::raw_sql("SELECT 1").execute(&mut *self.0).await;
        sound.map_err(doing("committing"))?;
        self.0.commit().await.map_err(doing("committing"))
    }

    async fn commit_appended(self: Box<Self>) -> Result<()> {
        self.0.commit().await.map_err(doing("committing"))
    }

    async fn rollback(self: Box<Self>) -> Result<()> {
        self.0.rollback().await.map_err(doing("rolling back"))
    }

    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        let statement = match step {
            Savepoint::Set => "SAVEPOINT postrider_step",
            Savepoint::Release => "RELEASE SAVEPOINT postrider_step",
            Savepoint::Return => "ROLLBACK TO SAVEPOINT postrider_step; RELEASE SAVEPOINT postrider_step",
        };
        let done = sqlx::raw_sql(statement).execute(&mut *self.0).await;
        done.map(drop).map_err(doing("setting a savepoint"))
    }
}

#[async_trait]
impl TransactionalLog for PostgresLog {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        // In a task, which runs to its end: cut off in the middle of a BEGIN, the connection would go back to the pool in a
        // transaction that the driver knows nothing of. What nobody takes is rolled back.
        let pool = self.pool().clone();
        let begun = tokio::spawn(async move { pool.begin().await }).await;
        let begun = begun.map_err(|error| {
            let text = "beginning a transaction failed: the runtime is shutting down";
            Error::new(ErrorKind::Unavailable, text).because(error)
        })?;
        let tx = begun.map_err(|error| {
            let pool = self.pool();
            let is_full = pool.num_idle() == 0 && pool.size() >= pool.options().get_max_connections();
            match error {
                sqlx::Error::PoolTimedOut if is_full => {
                    let text = "no connection of the Postgres pool became free: all of them are in use by this process";
                    Error::new(ErrorKind::Busy, text).with("connections", pool.size())
                }
                error => doing("beginning a transaction")(error),
            }
        })?;
        Ok(Box::new(PostgresTransaction(tx)))
    }

    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let connection: &mut PgConnection = tx.get_mut()?;
        check(connection).await?;
        if batch.is_empty() {
            return Ok(());
        }
        self.insert(connection, mailbox, batch).await
    }
}

/// The driver knows only of the transactions it began itself; the server knows of all.
pub(crate) async fn check(connection: &mut PgConnection) -> Result<()> {
    if connection.is_in_transaction() {
        return Ok(());
    }
    // Savepoints exist in transactions only: 25P01 without one.
    let savepoint = sqlx::raw_sql("SAVEPOINT postrider_check; RELEASE SAVEPOINT postrider_check");
    match savepoint.execute(connection).await {
        Ok(_) => Ok(()),
        Err(error) if crate::error::code(&error).as_deref() == Some("25P01") => Err(Error::new(
            ErrorKind::WrongTransaction,
            "the connection is in no transaction: begin one with `pool.begin().await?`, or say `bus.publish(…)`",
        )),
        Err(error) => Err(doing("checking for a transaction")(error)),
    }
}
