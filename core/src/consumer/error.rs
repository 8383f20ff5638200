use crate::ErrorKind;
use std::{error::Error as StdError, fmt, time::Duration};

/// What a handler returns.
pub type HandlerResult = Result<(), HandlerError>;

/// What a handler's error means for the next try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandlerErrorKind {
    /// It may pass: try again. What `?` makes of any error.
    Transient,
    /// It will not pass: no further try.
    Permanent,
    /// It passes after this long.
    RetryAfter(Duration),
    /// A service the handler needs is down: wait for it, and count no attempt. What `?` makes of an error of the event log
    /// that says so itself.
    Unavailable,
    /// An earlier event of its key waits in the inbox: it is parked behind that one, and no attempt is counted. What the
    /// [`Transactional`](super::Transactional) middleware returns.
    HeldBack,
    /// Somebody else goes on with this message: this process had lost it. Nothing is counted, and nothing done.
    TakenOver,
}

/// A handler's error. Like `anyhow::Error` it is no `std::error::Error` itself, so that `?` makes one of every error.
pub struct HandlerError {
    kind: HandlerErrorKind,
    source: Box<dyn StdError + Send + Sync>,
    beside: Vec<String>,
}

type Cause = Box<dyn StdError + Send + Sync>;

impl HandlerError {
    fn new(kind: HandlerErrorKind, cause: impl Into<Cause>) -> Self {
        Self {
            kind,
            source: cause.into(),
            beside: Vec::new(),
        }
    }
    /// It will not pass.
    pub fn permanent(cause: impl Into<Cause>) -> Self {
        Self::new(HandlerErrorKind::Permanent, cause)
    }
    /// It passes after `delay`.
    pub fn retry_after(delay: Duration, cause: impl Into<Cause>) -> Self {
        Self::new(HandlerErrorKind::RetryAfter(delay), cause)
    }
    /// A service is down. Costs no attempt, however long it takes.
    pub fn unavailable(cause: impl Into<Cause>) -> Self {
        Self::new(HandlerErrorKind::Unavailable, cause)
    }
    /// It may pass: what `?` makes of an error, but without a look at what it is.
    pub fn transient(cause: impl Into<Cause>) -> Self {
        Self::new(HandlerErrorKind::Transient, cause)
    }
    /// An error of the log in a call that depends on nothing the message says: it began a transaction, admitted the message,
    /// or read or wrote a note. Whatever the log lacks then, time or rights or room, is an outage.
    pub(super) fn of_the_log(error: crate::Error) -> Self {
        match error.kind() {
            ErrorKind::Conflict | ErrorKind::Config => Self::unavailable(error),
            _ => Self::from(error),
        }
    }

    /// Whether it is the log that is away, and not a service that a handler asked: then the attempt is no attempt, and nothing
    /// of it is compensated, for compensations need the log as well.
    pub(super) fn is_outage_of_the_log(&self) -> bool {
        self.kind == HandlerErrorKind::Unavailable && log_error(&*self.source).is_some_and(is_outage)
    }

    /// Whether the log is in use to the full by this process: nothing is away, and it is tried again in a moment.
    pub(super) fn is_busy(&self) -> bool {
        self.kind == HandlerErrorKind::Unavailable
            && log_error(&*self.source).is_some_and(|error| error.kind() == ErrorKind::Busy)
    }

    pub(super) fn held_back() -> Self {
        Self::new(
            HandlerErrorKind::HeldBack,
            "an earlier event of its key waits in the inbox",
        )
    }
    pub(super) fn taken_over() -> Self {
        Self::new(
            HandlerErrorKind::TakenOver,
            "another process has taken this message over",
        )
    }
    /// What it means.
    #[must_use]
    pub fn kind(&self) -> HandlerErrorKind {
        self.kind
    }
    /// What went wrong beside it: compensations that failed in their turn, each with its step.
    #[must_use]
    pub fn beside(&self) -> &[String] {
        &self.beside
    }
    pub(super) fn add(&mut self, beside: String) {
        self.beside.push(beside);
    }
    /// What went wrong, with its causes, on one line, and what went wrong beside it.
    #[must_use]
    pub fn to_chain(&self) -> String {
        let mut text = crate::error::chain(&*self.source);
        for beside in &self.beside {
            text.push_str("; beside it ");
            text.push_str(beside);
        }
        text
    }
    /// The error inside, if it is a `T`.
    #[must_use]
    pub fn downcast_ref<T: StdError + 'static>(&self) -> Option<&T> {
        self.source.downcast_ref()
    }
}

/// Whether an error says that the log or the broker is away, and nothing about the message.
pub(super) fn is_outage(error: &crate::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unavailable | ErrorKind::Storage | ErrorKind::Closed
    )
}

/// The first error of ours in a chain of causes: handlers wrap them in errors of their own.
fn log_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a crate::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

impl<E: Into<Cause>> From<E> for HandlerError {
    fn from(cause: E) -> Self {
        let cause = cause.into();
        // The log that failed is nobody's failure.
        let kind = match log_error(&*cause) {
            Some(error) if is_outage(error) || error.kind() == ErrorKind::Busy => HandlerErrorKind::Unavailable,
            _ => HandlerErrorKind::Transient,
        };
        Self::new(kind, cause)
    }
}

impl fmt::Display for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl fmt::Debug for HandlerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.to_chain())
    }
}
