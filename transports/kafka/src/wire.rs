//! Messages and what Kafka makes of them.

use bytes::{Bytes, BytesMut};
use postrider_core::{
    Message, Topic,
    clock::Timestamp,
    wire::{Arrived, Format, Names, Reader, Value},
};
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
};

/// As CloudEvents' binding for Kafka says, with what other bindings write.
pub(crate) const NAMES: Names = postrider_core::wire_names!("ce_", also "ce-", "cloudEvents:", "cloudEvents_");

/// Of dead letters: where they were sent to.
const TOPIC: &str = "postrider-topic";

/// The headers of a record, and its value; the rest of it is the message's key.
pub(crate) fn write(message: &Message, format: Format, sent_to: Option<&Topic>) -> (OwnedHeaders, Bytes) {
    // Eight of ours at most.
    let mut headers = Some(OwnedHeaders::new_with_capacity(
        9 + message.headers().len() + message.attributes().len(),
    ));
    let mut add = |name: &str, value: &[u8]| {
        let header = Header {
            key: name,
            value: Some(value),
        };
        headers = headers.take().map(|headers| headers.insert(header));
    };
    let body = NAMES.write(message, format, |name, value| match value {
        Value::Bytes(bytes) => add(name, bytes),
        value => add(name, value.as_text().as_bytes()),
    });
    add("content-type", body.content_type.as_bytes());
    if let Some(topic) = sent_to {
        add(TOPIC, topic.as_str().as_bytes());
    }
    (headers.unwrap_or_default(), body.payload)
}

/// Reads records, and makes what is in them our own.
#[derive(Debug, Default)]
pub(crate) struct Records {
    reader: Reader,
    /// Small payloads lie in a common block, which is freed with the last of them: one by one, of a size that allocators
    /// do not keep at hand, they cost a sixth of the rate at 1 KiB.
    block: BytesMut,
}

/// What a payload that is kept for long keeps with it, at most.
const BLOCK: usize = 32 * 1024;

impl Records {
    fn own(&mut self, payload: &[u8]) -> Bytes {
        if payload.len() > BLOCK / 8 {
            return Bytes::copy_from_slice(payload);
        }
        if self.block.capacity() < payload.len() {
            self.block = BytesMut::with_capacity(BLOCK);
        }
        self.block.extend_from_slice(payload);
        self.block.split().freeze()
    }
}

/// The message in a record that came from `topic`.
pub(crate) fn read(records: &mut Records, record: &BorrowedMessage<'_>, topic: &Topic) -> Message {
    let payload = records.own(record.payload().unwrap_or_default());
    let mut reading = records.reader.begin(&NAMES);
    let mut sent_to = None;
    let headers = record.headers();
    for n in 0..headers.map_or(0, |headers| headers.count()) {
        // The client panics at a name that is not UTF-8, which Kafka takes.
        let header = std::panic::AssertUnwindSafe(|| headers.and_then(|headers| headers.try_get(n)));
        let Ok(Some(header)) = std::panic::catch_unwind(header) else {
            tracing::warn!(%topic, "a header whose name is not UTF-8 is left out");
            continue;
        };
        let value = header.value.unwrap_or_default();
        if header.key == TOPIC {
            sent_to = std::str::from_utf8(value)
                .ok()
                .and_then(|name| Topic::parse(name.to_owned()).ok());
        } else {
            reading.header(header.key, value);
        }
    }
    let sent_to = sent_to.as_ref().unwrap_or(topic);
    let source = (!reading.has_source()).then(|| format!("kafka:{sent_to}"));
    let mut arrived = Arrived::new(sent_to, payload);
    arrived.source = source.as_deref();
    arrived.key = record.key();
    if !reading.has_id() {
        // With the time, for offsets begin anew where a topic is made anew.
        let at = record.timestamp().to_millis().unwrap_or_default();
        arrived.place = Some(format!("{topic}/{}/{}/{at}", record.partition(), record.offset()));
    }
    if !reading.has_time() {
        arrived.time = record
            .timestamp()
            .to_millis()
            .and_then(Timestamp::from_timestamp_millis);
    }
    reading.finish(arrived)
}
