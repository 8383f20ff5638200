use super::Owner;
use std::time::Duration;

/// A member of a consumer group, as it registers in the log: so that no other member acknowledges a message that this
/// one handles.
///
/// ```
/// use postrider_core::log::{GroupMember, Owner};
/// let member = GroupMember::new(Owner::new(), ["order.placed.v1"], ["orders.*"]);
/// assert_eq!(member.types, ["order.placed.v1"]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupMember {
    /// The identity of this subscription: fresh for every start.
    pub owner: Owner,
    /// The event types it handles.
    pub types: Vec<String>,
    /// The topics it subscribes to: names or patterns, as text.
    pub topics: Vec<String>,
}

impl GroupMember {
    /// A member that handles `types` and subscribes to `topics`.
    #[must_use]
    pub fn new<T, U>(owner: Owner, types: T, topics: U) -> Self
    where
        T: IntoIterator<Item: Into<String>>,
        U: IntoIterator<Item: Into<String>>,
    {
        Self {
            owner,
            types: types.into_iter().map(Into::into).collect(),
            topics: topics.into_iter().map(Into::into).collect(),
        }
    }
}

/// A member that the log knows, with its ages by the log's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegisteredMember {
    /// The member, as it registered last.
    pub member: GroupMember,
    /// The time since it registered first.
    pub registered_for: Duration,
    /// The time since it registered last.
    pub unseen_for: Duration,
}

impl RegisteredMember {
    /// A member as a log gives it.
    #[must_use]
    pub fn new(member: GroupMember, registered_for: Duration, unseen_for: Duration) -> Self {
        Self {
            member,
            registered_for,
            unseen_for,
        }
    }
}
