//! Appending in the caller's transaction.

use crate::{SqliteLog, error::doing};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, Mailbox, Result,
    log::{Lent, LogTransaction, NewRecord, Savepoint, TransactionOf, TransactionalLog},
};
use sqlx::{Connection as _, Sqlite, SqliteConnection, Transaction};

impl TransactionOf<SqliteLog> for Transaction<'_, Sqlite> {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive::<SqliteConnection>(&mut **self)
    }
}

/// A plain connection has to be in a transaction, which is checked when something is appended.
impl TransactionOf<SqliteLog> for SqliteConnection {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive(self)
    }
}

#[derive(Debug)]
struct SqliteTransaction(Transaction<'static, Sqlite>);

#[async_trait]
impl LogTransaction for SqliteTransaction {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive::<SqliteConnection>(&mut *self.0)
    }
    async fn commit(self: Box<Self>) -> Result<()> {
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
impl TransactionalLog for SqliteLog {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        // A deferred transaction that has read cannot always become a writer.
        let tx = self
            .pool()
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(doing("beginning a transaction"))?;
        Ok(Box::new(SqliteTransaction(tx)))
    }

    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let connection: &mut SqliteConnection = tx.get_mut()?;
        check(connection)?;
        if batch.is_empty() {
            return Ok(());
        }
        self.insert(connection, mailbox, batch).await
    }
}

pub(crate) fn check(connection: &SqliteConnection) -> Result<()> {
    if connection.is_in_transaction() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::WrongTransaction,
        "the connection is in no transaction: begin one with `pool.begin().await?`, or say `bus.publish(…)`",
    ))
}
