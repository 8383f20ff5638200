#![doc = include_str!("../README.md")]

pub use postrider_core::*;

#[cfg(feature = "sqlite")]
pub use postrider_sqlite as sqlite;

pub mod docs;
