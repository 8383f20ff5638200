use crate::{Error, ErrorKind, GroupName, Result, RouteName};
use std::fmt;

/// One queue of a log. Outboxes and inboxes are alike: the same records, states, retries, clean-up and admin calls.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mailbox {
    /// Events on their way to a broker.
    Outbox(RouteName),
    /// Messages on their way to the handlers of a group: what waits for a retry, and its dead letters.
    Inbox(GroupName),
}

impl Mailbox {
    /// The outbox there always is.
    #[must_use]
    pub const fn outbox() -> Self {
        Self::Outbox(RouteName::DEFAULT)
    }
}

impl fmt::Display for Mailbox {
    /// `outbox:<route>` or `inbox:<group>`: what a log stores it under.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outbox(route) => write!(f, "outbox:{route}"),
            Self::Inbox(group) => write!(f, "inbox:{group}"),
        }
    }
}

impl std::str::FromStr for Mailbox {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            Some(("outbox", route)) => Ok(Self::Outbox(route.parse()?)),
            Some(("inbox", group)) => Ok(Self::Inbox(group.parse()?)),
            _ => Err(Error::new(
                ErrorKind::Invalid,
                "not a mailbox: expected `outbox:<route>` or `inbox:<group>`",
            )
            .with("name", format!("{:?}", crate::message::shortened(text)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for mailbox in [Mailbox::outbox(), Mailbox::Inbox(GroupName::new("billing"))] {
            assert_eq!(mailbox.to_string().parse::<Mailbox>().unwrap(), mailbox);
        }
        assert!("outbox".parse::<Mailbox>().is_err());
        assert!("inbox:".parse::<Mailbox>().is_err());
    }
}
