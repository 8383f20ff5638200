use super::{MAX_KEY_BYTES, Message, shortened};
use crate::{Error, ErrorKind, Result};

/// The bytes that a broker adds to each header: the prefix of its name, its type and its lengths.
const AROUND_HEADER: usize = 20;

/// What a message may measure. Checked when it is published, so that nothing is accepted that a broker then refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The most bytes that payload, headers and names may have together; 900 KiB by default, a little under the limit
    /// of 1 MiB that NATS and Kafka come with.
    pub max_message_bytes: usize,
    /// The most bytes that names and values of headers and attributes may have together, each pair counted with twenty bytes more;
    /// 120 KiB by default, a little under what a frame of RabbitMQ holds.
    pub max_header_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 900 * 1024,
            max_header_bytes: 120 * 1024,
        }
    }
}

impl Limits {
    /// The most bytes a header's name, a type, a source or a content type may have: what a short text of AMQP holds.
    pub const MAX_NAME_BYTES: usize = 255;

    /// Sets the most bytes of a message.
    #[must_use]
    pub fn with_max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = bytes;
        self
    }

    /// Sets the most bytes of headers and attributes.
    #[must_use]
    pub fn with_max_header_bytes(mut self, bytes: usize) -> Self {
        self.max_header_bytes = bytes;
        self
    }

    /// Whether `message` may be published.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] that names the part, what is wrong with it, and the message's id and topic.
    pub fn check(&self, message: &Message) -> Result<()> {
        self.problem(message).map_or(Ok(()), |error| {
            Err(error.with("topic", message.topic()).with("message", message.id()))
        })
    }

    fn problem(&self, message: &Message) -> Option<Error> {
        let named = [
            ("type", Some(message.kind())),
            ("source", message.source()),
            ("content type", Some(message.content_type())),
        ];
        for (what, text) in named {
            if let Some(why) = text.and_then(name_problem) {
                return Some(invalid(format!("the {what} of a message {why}")));
            }
        }
        if let Some(key) = message.key() {
            if key.is_empty() {
                return Some(invalid(
                    "the key of a message is empty: leave the key out for an unordered message",
                ));
            }
            if key.len() > MAX_KEY_BYTES {
                return Some(
                    invalid(format!("the key of a message has more than {MAX_KEY_BYTES} bytes"))
                        .with("bytes", key.len()),
                );
            }
            if key.contains('\0') {
                return Some(invalid("the key of a message contains NUL").with("key", format!("{key:?}")));
            }
        }
        // What came from elsewhere may go on as it came.
        let is_foreign = message.event_id_text().is_some();
        for (name, value) in message.attributes() {
            let problem = match is_foreign {
                true => name_problem(name),
                false => super::attribute::name_problem(name),
            };
            if let Some(why) = problem {
                let shown = format!("{:?}", shortened(name));
                return Some(invalid(format!("the name of an attribute {why}")).with("attribute", shown));
            }
            if value.as_str().is_some_and(|text| text.contains('\0')) {
                let shown = format!("{:?}", shortened(name));
                return Some(invalid("the value of an attribute contains NUL").with("attribute", shown));
            }
        }
        for (name, value) in message.headers() {
            if let Some(why) = name_problem(name) {
                let shown = format!("{:?}", shortened(name));
                return Some(invalid(format!("the name of a header {why}")).with("header", shown));
            }
            if !is_foreign && crate::wire::is_reserved(name) {
                let text = "the name of a header is one that CloudEvents or Postrider use on the wire: choose another";
                return Some(invalid(text).with("header", shortened(name)));
            }
            if value.contains('\0') {
                let shown = format!("{:?}", shortened(name));
                return Some(invalid("the value of a header contains NUL").with("header", shown));
            }
        }
        let of_headers = message
            .headers()
            .iter()
            .map(|(name, value)| name.len() + value.len() + AROUND_HEADER);
        let of_attributes = message
            .attributes()
            .iter()
            .map(|(name, value)| name.len() + value.size() + AROUND_HEADER);
        let headers: usize = of_headers.chain(of_attributes).sum();
        if headers > self.max_header_bytes {
            let text = "the headers of the message are too large: put what they say into the payload";
            let error = invalid(text).with("bytes", headers).with("most", self.max_header_bytes);
            return Some(error);
        }
        let size = message.size();
        (size > self.max_message_bytes).then(|| {
            invalid("the message is too large: keep the bulk elsewhere and send a reference")
                .with("bytes", size)
                .with("most", self.max_message_bytes)
        })
    }
}

fn invalid(text: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Invalid, text)
}

fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.len() > Limits::MAX_NAME_BYTES {
        Some("has more than 255 bytes")
    } else if name.contains('\0') {
        Some("contains NUL")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topic;

    fn message() -> Message {
        Message::new(Topic::new("t"), "e.v1", "")
    }

    #[test]
    fn each_wrong_part_is_named() {
        let limits = Limits::default();
        limits.check(&message().with_header("h", "").with_key("k")).unwrap();
        for (bad, says) in [
            (message().with_key(""), "key of a message is empty"),
            (message().with_key("k".repeat(513)), "more than 512 bytes"),
            (message().with_key("a\0b"), "contains NUL"),
            (message().with_header("", "x"), "name of a header is empty"),
            (message().with_header("h", "\0"), "value of a header contains NUL"),
            (message().with_header("h".repeat(2000), ""), "more than 255"),
            (
                message().with_header("h", "x".repeat(130_000)),
                "the headers of the message are too large",
            ),
            (message().with_header("ce_id", "x"), "one that CloudEvents"),
            (message().with_attribute("tenantId", "x"), "letters a to z"),
            (message().with_attribute("source", "x"), "a setter of its own"),
            (message().with_source(""), "source of a message is empty"),
            (Message::new(Topic::new("t"), "", ""), "type of a message is empty"),
            (Message::new(Topic::new("t"), "e", vec![0; 900 * 1024]), "too large"),
        ] {
            let error = limits.check(&bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            let text = error.to_string();
            assert!(text.contains(says) && text.contains("topic: t"), "{text}");
            assert!(text.len() < 400, "{text}");
        }
    }
}
