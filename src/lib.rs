#![doc = include_str!("../README.md")]

pub use postrider_core::*;

#[cfg(feature = "kafka")]
pub use postrider_kafka as kafka;
#[cfg(feature = "postgres")]
pub use postrider_postgres as postgres;
#[cfg(feature = "rabbitmq")]
pub use postrider_rabbitmq as rabbitmq;
#[cfg(feature = "sqlite")]
pub use postrider_sqlite as sqlite;

pub mod docs;
