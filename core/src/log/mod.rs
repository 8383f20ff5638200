//! The event log: where events wait between a commit and a broker, and between a broker and a handler.
//!
//! A log holds [mailboxes](Mailbox); a mailbox holds records; a relay has a [`Session`] on a mailbox, through which it
//! claims records, attempts them and settles them. What a record's state means, in one table:
//!
//! | state | where it lies | what moves it on | its key's place | attempts |
//! |---|---|---|---|---|
//! | `Pending`, due | the hot table | a claim by the session that holds the lease | in the order of commits | 0 |
//! | `Pending`, scheduled ([`Placement::Scheduled`]) | apart, by due time | its time: it then enters the hot table at the end | given up | 0 |
//! | `Pending`, parked ([`Outcome::Parked`], [`Placement::Parked`]) | apart, by key | its due time: it is claimed with its followers | kept: later ones of its key wait behind it | those counted so far |
//! | `Pending`, behind a parked one | apart, by key | the one before it being settled | kept | its own |
//! | `Pending`, waiting for its topic ([`Until::Resumed`]) | apart, by key | [`Session::resume`] | kept | not counted |
//! | `InProgress` | where it was; nothing is written | a settle, or the end of the lease | kept | as stored |
//! | `Succeeded` | deleted, or in the history while `retention` lasts | [`EventLogStore::purge`] | – | as stored |
//! | `Failed` ([`Outcome::Failed`], [`Placement::Failed`]) | the dead letters | redrive or discard, by a person; never a purge unless asked | given up: its followers go on | those counted |
//! | `Failed`, holding its key (`hold_key`) | the dead letters | redrive or discard | kept: its followers wait | those counted |
//!
//! - **redrive** of a failed record: its attempts begin anew. One that held its key goes on in its place; any other has
//!   given its place up and enters at the end.
//! - **discard** removes a failed record; if it held its key, the next of that key becomes due.
//! - Within a session nothing of a key is claimed while something of that key is unsettled.

mod admin;
mod dead_letters;
mod event_log;
mod headers;
mod holdings;
mod inbox;
mod lease;
mod mailbox;
mod members;
mod record;
mod schema;
mod session;
mod store;
mod transaction;

pub use admin::{Cursor, Filter, Listing, LogAdmin, Page, Stats, Stored};
pub use dead_letters::{DeadLetters, Pace};
pub use event_log::{EventLog, LogCapabilities};
pub use headers::Headers;
pub use holdings::Holdings;
pub use inbox::{Admission, Arrival, InboxLog, Note};
pub use lease::{Lease, Renewal};
pub use mailbox::Mailbox;
pub use members::{GroupMember, RegisteredMember};
pub use record::{AttemptError, NewRecord, Owner, Placement, Record, RecordState, RecordTag};
pub use schema::LogSchema;
pub use session::{Claim, Claimed, Outcome, Parking, Session, SessionOptions, SettleReport, Settled, Until};
pub use store::{EventLogStore, Purge};
pub use transaction::{AnyLog, Lent, LogTransaction, LogTx, Savepoint, TransactionOf, TransactionalLog};
