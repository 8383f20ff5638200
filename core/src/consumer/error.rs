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

impl<E: Into<Cause>> From<E> for HandlerError {
    fn from(cause: E) -> Self {
        let cause = cause.into();
        // The log that failed is nobody's failure.
        let of_ours = cause.downcast_ref::<crate::Error>().map(crate::Error::kind);
        let kind = match of_ours {
            Some(ErrorKind::Unavailable | ErrorKind::Storage) => HandlerErrorKind::Unavailable,
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
