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
//! | headers `subject` `dataschema` `correlationid` `causationid` | of the same names | |
//! | other headers, `traceparent` among them | none | headers of the broker under their own names |
//!
//! What comes from elsewhere is taken as it is: an attribute that is unknown becomes a header, a message without a type has
//! its topic's name for one, and its [id](MessageId) is that of its source and id, or of where it lay in the broker. NUL,
//! which no log stores, becomes U+FFFD.

mod json;
mod read;

pub use read::{Arrived, Reader, Reading};

use crate::{Message, MessageId, message::Text};
use bytes::Bytes;
use chrono::SecondsFormat;
use std::fmt::Write as _;

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

/// Holds the text of an id that is not a UUID as we write it, so that it goes out as it came in.
const ORIGINAL_ID: &str = "postrider-original-id";

/// Headers that are attributes on the wire.
const ATTRIBUTES: [&str; 4] = ["subject", "dataschema", "correlationid", "causationid"];

/// Whether a header may not be called this, since it would be taken for something else on the wire.
pub(crate) fn is_reserved(name: &str) -> bool {
    let begins = |with: &str| {
        name.get(..with.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(with))
    };
    ["ce_", "ce-", "cloudevents", "postrider-"].into_iter().any(begins) || name.eq_ignore_ascii_case("content-type")
}

/// What a broker's headers are called. Made by [`wire_names!`](crate::wire_names).
#[derive(Debug, Clone, Copy)]
#[allow(clippy::exhaustive_structs)]
pub struct Names {
    /// What the names of attributes begin with.
    pub prefix: &'static str,
    /// What they may begin with too.
    pub also: &'static [&'static str],
    /// The names in full: specversion, id, type, source, time, partitionkey, sequence, and the attributes that are headers
    /// of a message.
    #[doc(hidden)]
    pub full: [&'static str; 11],
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
                concat!($prefix, "subject"),
                concat!($prefix, "dataschema"),
                concat!($prefix, "correlationid"),
                concat!($prefix, "causationid"),
            ],
        }
    };
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
    pub fn write(&self, message: &Message, format: Format, mut header: impl FnMut(&str, &str)) -> Body {
        match format {
            Format::Binary => self.write_binary(message, &mut header),
            Format::Structured => {
                for (name, value) in message.headers() {
                    if attribute(name).is_none() && name != ORIGINAL_ID {
                        header(name, value);
                    }
                }
                Body {
                    content_type: Text::from_static(STRUCTURED),
                    payload: json::write(message),
                }
            }
        }
    }

    fn write_binary(&self, message: &Message, header: &mut impl FnMut(&str, &str)) -> Body {
        let [specversion, id, kind, source, time, key, sequence, ..] = self.full;
        header(specversion, "1.0");
        with_id(message, |text| header(id, text));
        header(kind, message.kind());
        header(source, message.source().unwrap_or_default());
        if let Some(at) = message.time() {
            header(time, &at.to_rfc3339_opts(SecondsFormat::AutoSi, true));
        }
        if let Some(text) = message.key() {
            header(key, text);
        }
        if let Some(position) = message.sequence() {
            header(sequence, &sequence_text(position));
        }
        for (name, value) in message.headers() {
            match attribute(name) {
                Some(n) => header(self.full[7 + n], value),
                None if name == ORIGINAL_ID => {}
                None => header(name, value),
            }
        }
        Body {
            content_type: message.content_type_text().clone(),
            payload: message.payload().clone(),
        }
    }

    /// The attribute that a header of this name holds; `None` if it is a header like any other.
    fn attribute<'n>(&self, name: &'n str) -> Option<&'n str> {
        if let Some(rest) = name.strip_prefix(self.prefix) {
            return Some(rest);
        }
        self.also.iter().find_map(|prefix| {
            let start = name.get(..prefix.len())?;
            start.eq_ignore_ascii_case(prefix).then(|| &name[prefix.len()..])
        })
    }
}

fn attribute(name: &str) -> Option<usize> {
    ATTRIBUTES.iter().position(|attribute| *attribute == name)
}

fn sequence_text(position: u64) -> String {
    let mut text = String::with_capacity(20);
    let _ = write!(text, "{position:020}");
    text
}

/// The id as it is written: as it was, for a message from elsewhere.
fn with_id(message: &Message, write: impl FnOnce(&str)) {
    if let Some(original) = message.header(ORIGINAL_ID)
        && id_of(message.source().unwrap_or_default(), original) == message.id()
    {
        return write(original);
    }
    let mut text = uuid::Uuid::encode_buffer();
    write(message.id().as_uuid().hyphenated().encode_lower(&mut text));
}

/// The id of a message that says it has this one: itself if it is a UUID, which nobody else has.
fn id_of(source: &str, text: &str) -> MessageId {
    text.parse().unwrap_or_else(|_| MessageId::foreign(source, text))
}

#[cfg(test)]
mod tests;
