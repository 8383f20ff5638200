use crate::{Error, ErrorKind, GroupName, Result};
use std::fmt;
use uuid::Uuid;

/// What a message is known by, everywhere and for ever: the receiver drops a second one of the same id.
///
/// A UUID: version 7 for messages of ours, version 5 for derived ones and for messages of others.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(Uuid);

/// The name space of derived ids: part of the wire format, never to be changed.
const DERIVED: Uuid = Uuid::from_u128(0x6f1d_5f0a_3c0b_5c6e_9a57_21b0_54c1_7e01);
const FOREIGN: Uuid = Uuid::from_u128(0x6f1d_5f0a_3c0b_5c6e_9a57_21b0_54c1_7e02);

impl MessageId {
    /// A fresh id: a UUID of version 7. Ids of one process ascend.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id of the `n`-th message that `group` makes out of message `of`: the same each time it tries.
    #[must_use]
    pub fn derived(of: Self, group: &GroupName, n: u32) -> Self {
        let mut name = Vec::with_capacity(24 + group.as_str().len());
        name.extend_from_slice(of.0.as_bytes());
        name.extend_from_slice(&n.to_be_bytes());
        name.extend_from_slice(group.as_str().as_bytes());
        Self(Uuid::new_v5(&DERIVED, &name))
    }

    /// The id of a message that was not published by Postrider: from the source and id it came with.
    #[must_use]
    pub fn foreign(source: &str, id: &str) -> Self {
        let mut name = Vec::with_capacity(9 + source.len() + id.len());
        name.extend_from_slice(&(source.len() as u64).to_be_bytes());
        name.extend_from_slice(source.as_bytes());
        name.extend_from_slice(id.as_bytes());
        Self(Uuid::new_v5(&FOREIGN, &name))
    }

    /// An id from a UUID of any version.
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID.
    #[must_use]
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl std::str::FromStr for MessageId {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Uuid::parse_str(text)
            .map(Self)
            .map_err(|e| Error::new(ErrorKind::Invalid, "not a message id").because(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_ids_repeat_and_differ() {
        let (of, g, h) = (MessageId::new(), GroupName::new("g"), GroupName::new("h"));
        assert_eq!(MessageId::derived(of, &g, 1), MessageId::derived(of, &g, 1));
        assert_ne!(MessageId::derived(of, &g, 1), MessageId::derived(of, &g, 2));
        assert_ne!(MessageId::derived(of, &g, 1), MessageId::derived(of, &h, 1));
        assert_ne!(MessageId::foreign("ab", "c"), MessageId::foreign("a", "bc"));
    }
}
