//! How messages look on a broker: CloudEvents 1.0, for authors of transports.
//!
//! In **binary** mode, the usual one, the payload is the broker's own, and the attributes are headers whose names begin
//! with what the broker's binding says ([`Names`]): `ce_type` on Kafka, `cloudEvents_type` on RabbitMQ. In **structured**
//! mode payload and attributes are one JSON text. Both are read, whatever is written.
//!
//! | of a message | attribute | |
//! |---|---|---|
//! | id, type, source, time | `id` `type` `source` `time` | with `specversion` |
//! | content type | `datacontenttype` | the broker's own content type in binary mode |
//! | key | `partitionkey` | an extension of CloudEvents |
//! | position in the log | `sequence` | an extension: 20 digits, so that texts sort as numbers |
//! | [attributes](Message::attributes): extensions, `subject`, `dataschema` | of the same names | of their own type where the broker has it |
//! | headers | none | headers of the broker under their own names |
//!
//! What comes from elsewhere is taken as it is, and goes out again as it came: its id is kept as text, and attributes that are
//! unknown are attributes. A message without a type has its topic's name for one, one without a source has the
//! application's or the topic's in the broker, and one without an id is known by where it lay in the broker, if no other message can
//! lie there. NUL, which no log stores, becomes U+FFFD.

mod json;
mod read;

pub use read::{Arrived, Reader, Reading};

use crate::{AttributeValue, Message, MessageId, message::Text};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use chrono::SecondsFormat;
use std::{borrow::Cow, fmt::Write as _};

/// How a message is laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// Attributes as headers, the payload by itself.
    #[default]
    Binary,
    /// Attributes and payload in one JSON text.
    Structured,
}

/// The content type of a message in structured mode.
pub const STRUCTURED: &str = "application/cloudevents+json";

/// What headers of our own begin with.
const OURS: &str = "postrider-";

/// Whether a header may not be called this, since it would be taken for something else on the wire.
pub(crate) fn is_reserved(name: &str) -> bool {
    let begins = |with: &str| {
        name.get(..with.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(with))
    };
    ["ce_", "ce-", "cloudevents", OURS].into_iter().any(begins) || name.eq_ignore_ascii_case("content-type")
}

/// What a broker's headers are called. Made by [`wire_names!`](crate::wire_names).
#[derive(Debug, Clone, Copy)]
#[allow(clippy::exhaustive_structs)]
pub struct Names {
    /// What the names of attributes begin with.
    pub prefix: &'static str,
    /// What they may begin with too.
    pub also: &'static [&'static str],
    /// The names in full: specversion, id, type, source, time, partitionkey, sequence.
    #[doc(hidden)]
    pub full: [&'static str; 7],
}

/// The [`Names`] with a prefix: `wire_names!("ce_")`, and others that are read too: `wire_names!("cloudEvents_", also
/// "cloudEvents:", "ce-")`.
#[macro_export]
macro_rules! wire_names {
    ($prefix:literal $(, also $($also:literal),+)?) => {
        $crate::wire::Names {
            prefix: $prefix,
            also: &[$($($also),+)?],
            full: [
                concat!($prefix, "specversion"),
                concat!($prefix, "id"),
                concat!($prefix, "type"),
                concat!($prefix, "source"),
                concat!($prefix, "time"),
                concat!($prefix, "partitionkey"),
                concat!($prefix, "sequence"),
            ],
        }
    };
}

/// The value of a header: of an attribute as it is, and a text for all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value<'a> {
    /// A text.
    Text(&'a str),
    /// An integer.
    Integer(i32),
    /// A truth value.
    Boolean(bool),
    /// Bytes of an attribute.
    Binary(&'a [u8]),
    /// Bytes of a header that is no text.
    Bytes(&'a [u8]),
}

/// What the text of a header begins with that is none, followed by its bytes in base64: a data URL (RFC 2397).
const BYTES: &str = "data:;base64,";

/// A header's value as a text. Bytes that are none can be told from any text, and are written back as what they were.
fn text_of(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(format!("{BYTES}{}", STANDARD.encode(bytes))),
    }
}

/// The bytes of a header that is no text.
fn bytes_of(text: &str) -> Option<Vec<u8>> {
    let bytes = STANDARD.decode(text.strip_prefix(BYTES)?).ok()?;
    std::str::from_utf8(&bytes).is_err().then_some(bytes)
}

impl<'a> Value<'a> {
    /// The canonical text of CloudEvents, for brokers whose headers are texts.
    #[must_use]
    pub fn as_text(self) -> Cow<'a, str> {
        match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Integer(n) => Cow::Owned(n.to_string()),
            Self::Boolean(yes) => Cow::Borrowed(if yes { "true" } else { "false" }),
            Self::Binary(bytes) => Cow::Owned(STANDARD.encode(bytes)),
            Self::Bytes(bytes) => text_of(bytes),
        }
    }
}

impl<'a> From<&'a AttributeValue> for Value<'a> {
    fn from(value: &'a AttributeValue) -> Self {
        match value {
            AttributeValue::Text(text) => Self::Text(text),
            AttributeValue::Integer(n) => Self::Integer(*n),
            AttributeValue::Boolean(yes) => Self::Boolean(*yes),
            AttributeValue::Binary(bytes) => Self::Binary(bytes),
        }
    }
}

/// What is not a header.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Body {
    /// The content type, for the broker's own field of that name.
    pub content_type: Text,
    /// The bytes.
    pub payload: Bytes,
}

impl Names {
    /// Lays out a message: gives its headers to `header`, names and values, and returns the rest.
    ///
    /// In the order: attributes, then the message's headers as they are. A header that is there twice is given twice.
    pub fn write(&self, message: &Message, format: Format, mut header: impl FnMut(&str, Value<'_>)) -> Body {
        let body = match format {
            // In binary mode it would be taken for a message in structured mode.
            Format::Binary if !read::is_structured(message.content_type()) => self.write_binary(message, &mut header),
            _ => Body {
                content_type: Text::from_static(STRUCTURED),
                payload: json::write(message),
            },
        };
        for (name, value) in message.headers() {
            match bytes_of(value) {
                None => header(name, Value::Text(value)),
                Some(bytes) => header(name, Value::Bytes(&bytes)),
            }
        }
        body
    }

    fn write_binary(&self, message: &Message, header: &mut impl FnMut(&str, Value<'_>)) -> Body {
        let [specversion, id, kind, source, time, key, sequence] = self.full;
        header(specversion, Value::Text("1.0"));
        with_id(message, |text| header(id, Value::Text(text)));
        header(kind, Value::Text(message.kind()));
        header(source, Value::Text(message.source().unwrap_or_default()));
        // What came from elsewhere may have a time or a sequence that is none: it stays what it was.
        let is_free = |name: &str| message.attribute(name).is_none();
        if let Some(at) = message.time().filter(|_| is_free("time")) {
            header(time, Value::Text(&at.to_rfc3339_opts(SecondsFormat::AutoSi, true)));
        }
        if let Some(text) = message.key() {
            header(key, Value::Text(text));
        }
        if let Some(position) = message.sequence().filter(|_| is_free("sequence")) {
            header(sequence, Value::Text(&sequence_text(position)));
        }
        let mut name = String::new();
        for (attribute, value) in message.attributes() {
            name.clear();
            name.push_str(self.prefix);
            name.push_str(attribute);
            header(&name, value.into());
        }
        Body {
            content_type: message.content_type_text().clone(),
            payload: message.payload().clone(),
        }
    }

    /// The attribute that a header of this name holds; `None` if it is a header like any other.
    #[must_use]
    pub fn attribute<'n>(&self, name: &'n str) -> Option<&'n str> {
        if let Some(rest) = name.strip_prefix(self.prefix) {
            return Some(rest);
        }
        self.also.iter().find_map(|prefix| {
            let start = name.get(..prefix.len())?;
            start.eq_ignore_ascii_case(prefix).then(|| &name[prefix.len()..])
        })
    }
}

fn sequence_text(position: u64) -> String {
    let mut text = String::with_capacity(20);
    let _ = write!(text, "{position:020}");
    text
}

/// The id as it is written: as it was, for a message from elsewhere.
fn with_id(message: &Message, write: impl FnOnce(&str)) {
    if let Some(text) = message.event_id_text() {
        return write(text);
    }
    let mut text = uuid::Uuid::encode_buffer();
    write(message.id().as_uuid().hyphenated().encode_lower(&mut text));
}

/// What a message is known by whose CloudEvents id is this text, and the text, where that has to be kept.
pub(crate) fn identity(source: &str, text: &str) -> (MessageId, Option<Text>) {
    let mut written = uuid::Uuid::encode_buffer();
    match text.parse::<MessageId>() {
        Ok(id) if id.is_ours() && text == id.as_uuid().hyphenated().encode_lower(&mut written) => (id, None),
        _ => (MessageId::foreign(source, text), Some(text.to_owned().into())),
    }
}

#[cfg(test)]
mod tests;
