//! What Postgres's errors mean.

use postrider_core::{Error, ErrorKind};

/// The five characters of SQLSTATE, where the error is the server's own.
/// <https://www.postgresql.org/docs/15/errcodes-appendix.html>
pub(crate) fn code(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

/// Whether the connection it happened on is of no use any more.
pub(crate) fn is_lost(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<sqlx::Error>());
    source.is_some_and(|error| match code(error) {
        Some(code) => matches!(code.get(..2), Some("08" | "57" | "58" | "XX")) && code != "57014",
        None => true,
    })
}

/// Whether the statement failed, and the connection stands.
pub(crate) fn is_refused(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<sqlx::Error>());
    source.is_some_and(|error| code(error).is_some()) && !is_lost(error)
}

pub(crate) fn from_sqlx(doing: &'static str, error: sqlx::Error) -> Error {
    use ErrorKind::{Closed, Config, Conflict, Invalid, Storage, Unavailable, Unexpected, WrongTransaction};
    let (kind, says) = match code(&error).as_deref() {
        Some(code) => match code {
            "40001" | "40P01" => (Conflict, "another transaction changed the same rows: try it again"),
            "55P03" => (
                Unavailable,
                "a lock on the event log's tables was not to be had in time",
            ),
            "57014" => (Unavailable, "Postgres cancelled the statement: it took too long"),
            "53100" => (Storage, "the disk of the Postgres server is full"),
            "25006" => (
                Unavailable,
                "the Postgres server takes no writes: it is a standby, or set to read-only",
            ),
            "25P02" => (
                WrongTransaction,
                "a statement of the transaction failed and the error was ignored: nothing of it can be committed",
            ),
            "42501" => (
                Config,
                "the Postgres role lacks a right on the event log: `grants_sql(role)` says which are needed",
            ),
            "3F000" | "42P01" | "42883" | "42703" => (
                Storage,
                "the event log's tables are missing in this database: run `bus.migrate()`, or the SQL of `migration_sql()`",
            ),
            "22021" | "22P05" => (Invalid, "a text is not valid in the encoding of the database"),
            "28000" | "28P01" => (Config, "Postgres refused the user or the password"),
            "3D000" => (Config, "there is no such Postgres database"),
            _ => match code.get(..2) {
                Some("08" | "57") => (Unavailable, "the connection to Postgres was lost"),
                Some("53") => (Unavailable, "the Postgres server has no room for this now"),
                Some("58" | "XX") => (Storage, "the Postgres server reports an internal failure"),
                _ => (Unexpected, "Postgres refused a statement"),
            },
        },
        None => match &error {
            sqlx::Error::PoolTimedOut => (
                Unavailable,
                "no connection of the Postgres pool became free: is a transaction held open while another is begun?",
            ),
            sqlx::Error::PoolClosed => (Closed, "the Postgres pool has been closed"),
            sqlx::Error::Configuration(_) => (Config, "the address of the Postgres server makes no sense"),
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
                (Unavailable, "the connection to Postgres was lost, or could not be made")
            }
            _ => (Unexpected, "the Postgres driver failed"),
        },
    };
    Error::new(kind, says).with("doing", doing).because(error)
}

/// `map_err(doing("what"))`
pub(crate) fn doing(what: &'static str) -> impl Fn(sqlx::Error) -> Error {
    move |error| from_sqlx(what, error)
}
