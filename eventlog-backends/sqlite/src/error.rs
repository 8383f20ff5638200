//! What SQLite's errors mean.

use postrider_core::{Error, ErrorKind};

// Primary result codes, https://www.sqlite.org/rescode.html
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const READONLY: i32 = 8;
const IOERR: i32 = 10;
const CORRUPT: i32 = 11;
const FULL: i32 = 13;
const CANTOPEN: i32 = 14;
const NOTADB: i32 = 26;
const BUSY_SNAPSHOT: i32 = 517;
/// A column that may not be null was to be.
pub(crate) const NOT_NULL: i32 = 1299;

/// The extended result code, where the error is SQLite's own.
pub(crate) fn code(error: &sqlx::Error) -> Option<i32> {
    error.as_database_error()?.code()?.parse().ok()
}

pub(crate) fn from_sqlx(doing: &'static str, error: sqlx::Error) -> Error {
    let code = code(&error);
    let (kind, says) = match code {
        Some(BUSY_SNAPSHOT) => (
            ErrorKind::Conflict,
            "the transaction began as a reader and another has written since: begin it with `BEGIN IMMEDIATE`",
        ),
        Some(code) => match code & 0xff {
            BUSY | LOCKED => (ErrorKind::Unavailable, "the SQLite file is locked by another writer"),
            FULL => (ErrorKind::Storage, "the disk is full"),
            READONLY => (ErrorKind::Storage, "the SQLite file, or its folder, cannot be written"),
            CORRUPT | NOTADB => (ErrorKind::Storage, "the file is corrupt, or no SQLite database"),
            CANTOPEN => (
                ErrorKind::Storage,
                "the SQLite file cannot be opened: does its folder exist?",
            ),
            IOERR => (ErrorKind::Storage, "the SQLite file cannot be read or written"),
            _ => (ErrorKind::Unexpected, "SQLite refused a statement"),
        },
        None => match &error {
            sqlx::Error::PoolTimedOut => (
                ErrorKind::Busy,
                "no connection of the SQLite pool became free: is a transaction held open while another is begun?",
            ),
            sqlx::Error::PoolClosed => (ErrorKind::Closed, "the SQLite pool has been closed"),
            sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed => {
                (ErrorKind::Unavailable, "the SQLite connection was lost")
            }
            _ => (ErrorKind::Unexpected, "the SQLite driver failed"),
        },
    };
    Error::new(kind, says).with("doing", doing).because(error)
}

/// `map_err(doing("what"))`
pub(crate) fn doing(what: &'static str) -> impl Fn(sqlx::Error) -> Error {
    move |error| from_sqlx(what, error)
}
