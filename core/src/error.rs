//! One error for every crate of the family.

use std::{borrow::Cow, error::Error as StdError, fmt};

/// `Result` with Postrider's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of error it is: what a program decides by.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A database, a broker or a service cannot be reached or is overloaded. Trying again later may succeed.
    Unavailable,
    /// Everything that could serve the call is in use by this process, such as all connections of a pool. Trying again soon may
    /// succeed; nothing is away.
    Busy,
    /// The input is wrong: an empty topic, an oversized payload, bytes that do not decode.
    Invalid,
    /// Somebody else changed the same thing at the same time. Trying again may succeed.
    Conflict,
    /// The lease under which records were claimed has run out; somebody else may hold them now.
    LeaseLost,
    /// The transaction given is none, or belongs to another database than the event log.
    WrongTransaction,
    /// The log or transport in use does not offer this.
    Unsupported,
    /// An option or a combination of parts makes no sense.
    Config,
    /// The bus, session or feed has been closed.
    Closed,
    /// The stored data cannot be used as it is: a corrupt file, a read-only one, a schema of a newer version.
    Storage,
    /// None of the above: most likely a defect.
    Unexpected,
}

/// What went wrong, with the values it went wrong with, and its cause as [`source`](StdError::source).
///
/// One word wide, so that the happy path of `Result<(), Error>` is eight bytes. `Display` prints the message and its
/// context, never the source: whoever prints the chain prints each link once. The shape follows OpenDAL's error.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: Cow<'static, str>,
    context: Vec<(&'static str, String)>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            context: Vec::new(),
            source: None,
        }))
    }

    /// Adds a value it went wrong with. Never a secret.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> Self {
        self.0.context.push((name, value.to_string()));
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// What sort of error it is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later without anybody changing anything: the only thing a retry asks.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.0.kind,
            ErrorKind::Unavailable | ErrorKind::Busy | ErrorKind::Conflict
        )
    }

    /// The whole chain on one line, as it is kept with a record and shown to an operator.
    #[must_use]
    pub fn to_chain(&self) -> String {
        chain(self)
    }
}

/// `error: its cause: the cause of that`, on one line.
#[must_use]
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        for (i, (name, value)) in self.0.context.iter().enumerate() {
            write!(f, "{}{name}: {value}", if i == 0 { " (" } else { ", " })?;
        }
        if self.0.context.is_empty() {
            Ok(())
        } else {
            f.write_str(")")
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        let mut source = StdError::source(self);
        while let Some(cause) = source {
            write!(f, "\n  caused by: {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|source| source as &(dyn StdError + 'static))
    }
}

/// The text of a panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no text".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_prints_each_link_once() {
        let inner = Error::new(ErrorKind::Unavailable, "refused").with("port", 5672);
        let outer = Error::new(ErrorKind::Unavailable, "no broker").because(inner);
        assert_eq!(outer.to_string(), "no broker");
        assert_eq!(outer.to_chain(), "no broker: refused (port: 5672)");
        assert!(outer.is_retryable());
        assert_eq!(std::mem::size_of::<Result<()>>(), 8);
    }
}
