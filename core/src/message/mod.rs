//! The wire form of an event: what the log stores and a broker carries.

mod attribute;
mod id;
mod limits;
mod text;
mod topic;

pub use attribute::AttributeValue;
pub use id::MessageId;
pub use limits::Limits;
pub use text::Text;
pub(crate) use topic::shortened;
pub use topic::{GroupName, MAX_KEY_BYTES, MAX_TOPIC_BYTES, RouteName, Topic};

use crate::clock::Timestamp;
use bytes::Bytes;
use std::{borrow::Cow, fmt, hash::BuildHasher, sync::Arc};

/// A message: id, type, source, topic, ordering key, headers, content type, time and payload.
///
/// The fields are those of CloudEvents 1.0. What identifies an event there is its source together with its id, whatever text that is:
/// [`event_id`](Message::event_id) is that text, and [`id`](Message::id) a UUID that stands for both. Cheap to clone: the clones share their content, and the `with_…` setters
/// copy it only if it is shared. It is checked against [`Limits`] when it is published, not while it is put together.
#[derive(Clone, PartialEq)]
pub struct Message {
    content: Arc<MessageParts>,
    sequence: Option<u64>,
}

/// What a message is made of, for authors of logs and transports, who have all of it at once.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::exhaustive_structs)]
pub struct MessageParts {
    /// What it is known by.
    pub id: MessageId,
    /// The CloudEvents `id`, where that is another text than the UUID.
    pub event_id: Option<Text>,
    /// The CloudEvents `type`.
    pub kind: Text,
    /// The application it comes from.
    pub source: Option<Text>,
    /// Where it goes.
    pub topic: Topic,
    /// The ordering key.
    pub key: Option<Box<str>>,
    /// Attributes of CloudEvents beside those that are fields here, by name, each name once.
    pub attributes: Vec<(Text, AttributeValue)>,
    /// The headers, in order.
    pub headers: Vec<(String, String)>,
    /// The content type of the payload.
    pub content_type: Text,
    /// When it happened.
    pub time: Option<Timestamp>,
    /// The encoded event.
    pub payload: Bytes,
}

impl Message {
    /// A message of type `kind` (for an event `<name>.v<version>`) for `topic`, with a fresh id.
    #[must_use]
    pub fn new(topic: Topic, kind: impl Into<Cow<'static, str>>, payload: impl Into<Bytes>) -> Self {
        Self::from(MessageParts {
            id: MessageId::new(),
            event_id: None,
            kind: kind.into().into(),
            source: None,
            topic,
            key: None,
            attributes: Vec::new(),
            headers: Vec::new(),
            content_type: Text::from_static("application/octet-stream"),
            time: None,
            payload: payload.into(),
        })
    }

    fn edit(mut self, change: impl FnOnce(&mut MessageParts)) -> Self {
        change(Arc::make_mut(&mut self.content));
        self
    }

    /// Sets the id. A receiver with an inbox drops the second message of one source and id.
    #[must_use]
    pub fn with_id(self, id: MessageId) -> Self {
        // What came from elsewhere may go on with the attributes it has.
        self.edit(|m| (m.id, m.event_id) = (id, m.event_id.as_ref().map(|_| id.to_string().into())))
    }

    /// Sets an attribute of CloudEvents: an extension, or `subject` or `dataschema`. Its name has only the letters a to z and
    /// digits. One of this name that is there is replaced.
    #[must_use]
    pub fn with_attribute(self, name: impl Into<Text>, value: impl Into<AttributeValue>) -> Self {
        let (name, value) = (name.into(), value.into());
        self.edit(|m| match place_of(&m.attributes, &name) {
            Ok(at) => m.attributes[at].1 = value,
            Err(at) => m.attributes.insert(at, (name, value)),
        })
    }

    /// As it is known to those it was sent to: by its source and its CloudEvents id. An id of ours, which nobody else has, is
    /// itself.
    #[must_use]
    pub(crate) fn arrived(self) -> Self {
        if self.content.event_id.is_some() || self.content.id.is_ours() {
            return self;
        }
        self.edit(|m| {
            let text = m.id.to_string();
            m.id = MessageId::foreign(m.source.as_deref().unwrap_or_default(), &text);
            m.event_id = Some(text.into());
        })
    }

    /// Sets where it goes.
    #[must_use]
    pub fn with_topic(self, topic: Topic) -> Self {
        self.edit(|m| m.topic = topic)
    }

    /// Sets the source: the application it comes from. Left out, the bus puts in its own.
    #[must_use]
    pub fn with_source(self, source: impl Into<Text>) -> Self {
        self.edit(|m| m.source = Some(source.into()))
    }

    /// Sets the ordering key: messages of one topic and key are delivered in the order of their commits.
    #[must_use]
    pub fn with_key(self, key: impl Into<String>) -> Self {
        self.edit(|m| m.key = Some(key.into().into_boxed_str()))
    }

    /// Adds a header behind those there are. Names may repeat; their order is kept.
    #[must_use]
    pub fn with_header(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.edit(|m| m.headers.push((name.into(), value.into())))
    }

    /// Sets the content type of the payload; `application/octet-stream` if left out.
    #[must_use]
    pub fn with_content_type(self, content_type: impl Into<Cow<'static, str>>) -> Self {
        self.edit(|m| m.content_type = content_type.into().into())
    }

    /// Sets when it happened. Left out, the bus puts in the time of publishing.
    #[must_use]
    pub fn with_time(self, time: Timestamp) -> Self {
        self.edit(|m| m.time = Some(time))
    }

    /// Sets its position in the log it was relayed from: the log's work.
    #[must_use]
    pub fn with_sequence(mut self, sequence: u64) -> Self {
        self.sequence = Some(sequence);
        self
    }

    /// What it is known by. For a message that this application made it is the CloudEvents id, too, and so it is wherever that
    /// message arrives, unless the id was [set](Message::with_id); for another one that arrived it is made of source and id.
    #[must_use]
    pub fn id(&self) -> MessageId {
        self.content.id
    }

    /// The CloudEvents id, as it goes over the wire.
    #[must_use]
    pub fn event_id(&self) -> Cow<'_, str> {
        match &self.content.event_id {
            Some(text) => Cow::Borrowed(text),
            None => Cow::Owned(self.content.id.to_string()),
        }
    }

    pub(crate) fn event_id_text(&self) -> Option<&Text> {
        self.content.event_id.as_ref()
    }

    /// The attributes of CloudEvents beside those that have a method of their own, by name: extensions, `subject`, `dataschema`.
    #[must_use]
    pub fn attributes(&self) -> &[(Text, AttributeValue)] {
        &self.content.attributes
    }

    /// The attribute of this name.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&AttributeValue> {
        let at = place_of(&self.content.attributes, name).ok()?;
        self.content.attributes.get(at).map(|(_, value)| value)
    }

    /// The CloudEvents `type`: for an event of ours `<name>.v<version>`.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.content.kind
    }

    /// The application it comes from; `None` only before it is published.
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        self.content.source.as_deref()
    }

    /// Where it goes.
    #[must_use]
    pub fn topic(&self) -> &Topic {
        &self.content.topic
    }

    /// The ordering key; `None` is unordered.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.content.key.as_deref()
    }

    /// The headers, in order.
    #[must_use]
    pub fn headers(&self) -> &[(String, String)] {
        &self.content.headers
    }

    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.content.headers.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The content type of the payload.
    #[must_use]
    pub fn content_type(&self) -> &str {
        &self.content.content_type
    }

    pub(crate) fn content_type_text(&self) -> &Text {
        &self.content.content_type
    }

    /// When it happened; `None` only before it is published, or for a foreign message that does not say.
    #[must_use]
    pub fn time(&self) -> Option<Timestamp> {
        self.content.time
    }

    /// Its position in the log it was relayed from: ascending within a topic and key, so a receiver can see an inversion.
    #[must_use]
    pub fn sequence(&self) -> Option<u64> {
        self.sequence
    }

    /// The encoded event.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.content.payload
    }

    /// What its size is measured by: payload, names and values of attributes and headers, key, type, source and content type, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        let content = &*self.content;
        let headers: usize = content.headers.iter().map(|(n, v)| n.len() + v.len()).sum();
        let attributes: usize = content.attributes.iter().map(|(n, v)| n.len() + v.size()).sum();
        headers
            + attributes
            + content.event_id.as_deref().map_or(0, str::len)
            + content.payload.len()
            + content.kind.len()
            + content.content_type.len()
            + content.key.as_deref().map_or(0, str::len)
            + content.source.as_deref().map_or(0, str::len)
    }

    /// A hash of (topic, key), for tables of keys in this process; `None` without a key. Not stable between versions.
    #[must_use]
    pub fn key_hash(&self) -> Option<u64> {
        Some(Self::hash_of_key(self.topic().as_str(), self.key()?))
    }

    /// The [`key_hash`](Message::key_hash) of a topic and key as a log has stored them, valid or not.
    #[must_use]
    pub fn hash_of_key(topic: &str, key: &str) -> u64 {
        rustc_hash::FxBuildHasher.hash_one((topic, key))
    }
}

/// Where an attribute is, or belongs.
pub(crate) fn place_of(attributes: &[(Text, AttributeValue)], name: &str) -> Result<usize, usize> {
    attributes.binary_search_by(|(known, _)| known.as_str().cmp(name))
}

impl From<MessageParts> for Message {
    fn from(parts: MessageParts) -> Self {
        Self {
            content: Arc::new(parts),
            sequence: None,
        }
    }
}

impl fmt::Debug for Message {
    /// Everything but the payload, of which it gives the size: a payload may hold what a log file should not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = &*self.content;
        f.debug_struct("Message")
            .field("id", &m.id)
            .field("type", &m.kind)
            .field("topic", &m.topic)
            .field("key", &m.key)
            .field("source", &m.source)
            .field("event_id", &m.event_id)
            .field("attributes", &m.attributes.len())
            .field("headers", &m.headers.len())
            .field("content_type", &m.content_type)
            .field("time", &m.time)
            .field("sequence", &self.sequence)
            .field("payload_bytes", &m.payload.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setters_do_not_touch_a_clone() {
        let one = Message::new(Topic::new("t"), "e.v1", "x").with_header("a", "1");
        let two = one.clone().with_header("a", "2").with_key("k");
        assert_eq!((one.headers().len(), one.key()), (1, None));
        assert_eq!((two.header("a"), two.headers().len()), (Some("1"), 2));
        assert_eq!(one.id(), two.id());
        assert!(!format!("{one:?}").contains("\"x\""));
    }
}
