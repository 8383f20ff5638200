#![doc = include_str!("../README.md")]

pub use postrider_core::*;

#[cfg(feature = "postgres")]
pub use postrider_postgres as postgres;
#[cfg(feature = "sqlite")]
pub use postrider_sqlite as sqlite;

pub mod docs;
