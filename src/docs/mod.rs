//! The long texts.

#[doc = include_str!("guarantees.md")]
pub mod guarantees {}

#[doc = include_str!("handlers.md")]
pub mod handlers {}

#[doc = include_str!("health.md")]
pub mod health {}

#[doc = include_str!("options.md")]
pub mod options {}

#[doc = include_str!("extending.md")]
pub mod extending {}
