use crate::{Error, ErrorKind, GroupName, Result};
use std::fmt;
use uuid::Uuid;

/// What a message is known by, everywhere and for ever: the receiver drops a second one of the same id.
///
/// A UUID: version 7 for messages of ours, version 5 for derived ones and for messages of others. Those that Postrider makes end
/// with `5052`, so that the receiver knows a UUID which nobody else has from one that another application may have, too: of that
/// one the source counts as well, as CloudEvents says.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(Uuid);

/// The name space of derived ids: part of the wire format, never to be changed.
const DERIVED: Uuid = Uuid::from_u128(0x6f1d_5f0a_3c0b_5c6e_9a57_21b0_54c1_7e01);
const FOREIGN: Uuid = Uuid::from_u128(0x6f1d_5f0a_3c0b_5c6e_9a57_21b0_54c1_7e02);

/// The last two bytes of ids that Postrider makes: part of the wire format.
const MARK: u128 = 0x5052;

impl MessageId {
    /// A fresh id: a UUID of version 7. Ids of one process ascend.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self::marked(Uuid::now_v7())
    }

    fn marked(uuid: Uuid) -> Self {
        Self(Uuid::from_u128(uuid.as_u128() & !0xffff | MARK))
    }

    /// Whether it was made by Postrider, here or elsewhere: then nobody else has it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.0.as_u128() & 0xffff == MARK && matches!(self.0.get_version_num(), 5 | 7 | 8)
    }

    /// The id of the `n`-th message that `group` makes out of message `of`: the same each time it tries.
    #[must_use]
    pub fn derived(of: Self, group: &GroupName, n: u32) -> Self {
        let mut name = Vec::with_capacity(24 + group.as_str().len());
        name.extend_from_slice(of.0.as_bytes());
        name.extend_from_slice(&n.to_be_bytes());
        name.extend_from_slice(group.as_str().as_bytes());
        Self::marked(Uuid::new_v5(&DERIVED, &name))
    }

    /// The id of a message whose CloudEvents id is not one that Postrider made: from the source and id it came with.
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

    #[test]
    fn ids_of_ours_are_known_and_ascend() {
        let ids: Vec<MessageId> = (0..10_000).map(|_| MessageId::new()).collect();
        assert!(ids.iter().all(MessageId::is_ours) && ids.is_sorted());
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        assert!(MessageId::derived(ids[0], &GroupName::new("g"), 1).is_ours());
        assert!(!MessageId::from_uuid(Uuid::from_u128(0x018f_4e6a_7c00_7000_8000_0000_0000_0001)).is_ours());
    }
}
