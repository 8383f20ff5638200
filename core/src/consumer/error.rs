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
    /// A service the handler needs is down: wait for it, and count no attempt.
    Unavailable,
}

/// A handler's error. Like `anyhow::Error` it is no `std::error::Error` itself, so that `?` makes one of every error.
pub struct HandlerError {
    kind: HandlerErrorKind,
    source: Box<dyn StdError + Send + Sync>,
}

type Cause = Box<dyn StdError + Send + Sync>;

impl HandlerError {
    /// It will not pass.
    pub fn permanent(cause: impl Into<Cause>) -> Self {
        Self {
            kind: HandlerErrorKind::Permanent,
            source: cause.into(),
        }
    }
    /// It passes after `delay`.
    pub fn retry_after(delay: Duration, cause: impl Into<Cause>) -> Self {
        Self {
            kind: HandlerErrorKind::RetryAfter(delay),
            source: cause.into(),
        }
    }
    /// A service is down. Costs no attempt, however long it takes.
    pub fn unavailable(cause: impl Into<Cause>) -> Self {
        Self {
            kind: HandlerErrorKind::Unavailable,
            source: cause.into(),
        }
    }
    /// What it means.
    #[must_use]
    pub fn kind(&self) -> HandlerErrorKind {
        self.kind
    }
    /// What went wrong, with its causes, on one line.
    #[must_use]
    pub fn to_chain(&self) -> String {
        crate::error::chain(&*self.source)
    }
}

impl<E: Into<Cause>> From<E> for HandlerError {
    fn from(cause: E) -> Self {
        Self {
            kind: HandlerErrorKind::Transient,
            source: cause.into(),
        }
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
