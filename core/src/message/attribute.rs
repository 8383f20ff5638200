use super::Text;
use crate::clock::Timestamp;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use chrono::SecondsFormat;
use serde_json::Value;
use std::{borrow::Cow, fmt};

/// The value of a CloudEvents attribute: a text, an integer, a truth value, or bytes. URIs and times are texts.
///
/// A broker that has only texts for attributes, as Kafka in binary mode, gives all of them back as texts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttributeValue {
    /// A String, a URI, a URI-reference or a Timestamp of CloudEvents.
    Text(Text),
    /// An Integer.
    Integer(i32),
    /// A Boolean.
    Boolean(bool),
    /// A Binary.
    Binary(Bytes),
}

impl AttributeValue {
    /// The canonical text that CloudEvents has for it: digits, `true` and `false`, Base64 for bytes.
    #[must_use]
    pub fn as_text(&self) -> Cow<'_, str> {
        match self {
            Self::Text(text) => Cow::Borrowed(text),
            Self::Integer(n) => Cow::Owned(n.to_string()),
            Self::Boolean(yes) => Cow::Borrowed(if *yes { "true" } else { "false" }),
            Self::Binary(bytes) => Cow::Owned(STANDARD.encode(bytes)),
        }
    }

    /// The text, if it is one.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// As JSON has it: bytes are a text there.
    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Integer(n) => Value::from(*n),
            Self::Boolean(yes) => Value::from(*yes),
            text => Value::from(text.as_text()),
        }
    }

    /// What JSON has for it. What CloudEvents does not know is its JSON text.
    pub(crate) fn from_json(value: Value) -> Self {
        match value {
            Value::Bool(yes) => Self::Boolean(yes),
            Value::String(text) => Self::Text(text.into()),
            Value::Number(n) => match n.as_i64().and_then(|n| i32::try_from(n).ok()) {
                Some(n) => Self::Integer(n),
                None => Self::Text(n.to_string().into()),
            },
            other => Self::Text(other.to_string().into()),
        }
    }

    pub(super) fn size(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Integer(_) | Self::Boolean(_) => 4,
            Self::Binary(bytes) => bytes.len(),
        }
    }
}

impl fmt::Display for AttributeValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.as_text())
    }
}

impl PartialEq<str> for AttributeValue {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == Some(other)
    }
}
impl PartialEq<&str> for AttributeValue {
    fn eq(&self, other: &&str) -> bool {
        self == *other
    }
}

impl From<Text> for AttributeValue {
    fn from(text: Text) -> Self {
        Self::Text(text)
    }
}
impl From<&str> for AttributeValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned().into())
    }
}
impl From<&String> for AttributeValue {
    fn from(text: &String) -> Self {
        text.as_str().into()
    }
}
impl From<String> for AttributeValue {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}
impl From<i32> for AttributeValue {
    fn from(n: i32) -> Self {
        Self::Integer(n)
    }
}
impl From<bool> for AttributeValue {
    fn from(yes: bool) -> Self {
        Self::Boolean(yes)
    }
}
impl From<Bytes> for AttributeValue {
    fn from(bytes: Bytes) -> Self {
        Self::Binary(bytes)
    }
}
impl From<Timestamp> for AttributeValue {
    fn from(time: Timestamp) -> Self {
        Self::Text(time.to_rfc3339_opts(SecondsFormat::AutoSi, true).into())
    }
}

/// Names of CloudEvents' own, which have setters of their own or are the wire's business.
const OWN: [&str; 10] = [
    "specversion",
    "id",
    "type",
    "source",
    "time",
    "datacontenttype",
    "data",
    "partitionkey",
    "sequence",
    "sequencetype",
];

/// Why an attribute may not be called this, if it may not.
pub(crate) fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > super::Limits::MAX_NAME_BYTES {
        Some("has more than 255 bytes")
    } else if !name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    {
        Some("has something other than the letters a to z and digits")
    } else if OWN.contains(&name) {
        Some("is one that CloudEvents has a meaning for: it has a setter of its own, or is the transport's business")
    } else {
        None
    }
}
