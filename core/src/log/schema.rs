use crate::Result;
use async_trait::async_trait;
use std::{fmt::Debug, sync::Arc};

/// The part of a log that has tables to be made: optional, attached to [`EventLog`](super::EventLog).
#[async_trait]
pub trait LogSchema: Debug + Send + Sync + 'static {
    /// Brings the tables to this program's version.
    ///
    /// # Contract
    /// Does nothing where they are of this version or a newer one. Safe on several nodes at once. All or nothing.
    ///
    /// Held, for the log that has tables to be made, by `postgres::many_nodes_migrate_at_once`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) if the right to create tables is lacking; it says what to do.
    async fn migrate(&self) -> Result<()>;

    /// Whether this program can work with the tables there are.
    ///
    /// # Errors
    /// [`ErrorKind::Storage`](crate::ErrorKind::Storage) if they are missing, older, or too new; it says what to do.
    async fn check(&self) -> Result<()>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: LogSchema + ?Sized> LogSchema for $pointer<S> {
            async fn migrate(&self) -> Result<()> {
                (**self).migrate().await
            }
            async fn check(&self) -> Result<()> {
                (**self).check().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn LogSchema) = |_| {};
