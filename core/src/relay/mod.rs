//! The relay: claims what is due in a mailbox, attempts it, and settles it.
//!
//! One task a mailbox runs the engine, pipelined and bounded: while one batch is with the broker the next
//! is claimed and the one before is settled.
//!
//! - **Order.** Of each (topic, key) one message is in flight; the next is sent once it is confirmed, since no broker
//!   promises that a refusal holds back what was sent behind it. Pipelining runs across keys.
//! - **Refusals.** At its first refusal a record is parked in the log, its key's followers behind it. The *local* tier
//!   tries it again from memory, `local_interval` apart, up to `local_max_attempts` tries in all; together they are one
//!   attempt. Then the *persistent* tier takes over: the record waits in the log, and is claimed when it is due.
//! - **Outages** cost no attempt. A lost connection stops the relay, which probes until it is back and then begins with
//!   one message and doubles; a connection that dies twice with the same single message in flight counts as a refusal
//!   of that message. A missing or full destination stops its topic only, whose records wait in the log.
//! - **Leases.** Before each hand-over to the client the lease is looked at; the call gets no longer than what is left.

mod attempts;
mod backoff;
mod cleanup;
mod engine;
mod flights;
mod held;
mod options;
mod outage;
mod report;
mod wake;

pub use backoff::Backoff;
pub use options::{ExhaustedFn, OnFailed, RelayOptions, SendOrder, TopicOptions, TopicPattern, Unroutable};
pub use report::{Counts, RelayReport};

pub(crate) use attempts::{Attempts, Publishing, Refusal};
pub(crate) use cleanup::clean_up;
pub(crate) use engine::{End, Engine, Parts};
pub(crate) use report::Reporter;
pub(crate) use wake::Wake;
