//! Messages and what AMQP makes of them.

use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldArray, FieldTable, MAX_SHORT_STRING_LENGTH, ShortString},
};
use postrider_core::{
    Message, Topic,
    clock::Timestamp,
    wire::{Arrived, Format, Names, Reader},
};

/// As CloudEvents' binding for AMQP says, with what other bindings write.
pub(crate) const NAMES: Names = postrider_core::wire_names!("cloudEvents_", also "cloudEvents:", "ce-", "ce_");

/// Of copies of a message: where it was sent to, how often it had been delivered, and how often it had been tried.
const TOPIC: &str = "postrider-topic";
const DELIVERIES: &str = "postrider-deliveries";
const ATTEMPTS: &str = "postrider-attempts";

/// Names of headers that the broker takes for routing keys, and closes the channel over if they hold a text; and what such
/// headers of a message are called instead.
const TAKEN: [(&str, &str); 2] = [("CC", "postrider-CC"), ("BCC", "postrider-BCC")];

/// What the broker adds.
const OF_BROKER: [&str; 3] = ["x-death", "x-delivery-count", "x-opt-"];
const OF_BROKER_TOO: [&str; 2] = ["x-first-death-", "x-last-death-"];

/// A copy that is to wait, or to lie among the dead letters.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// How often the message had been delivered.
    pub(crate) deliveries: u32,
    /// How often it had been tried, if that is to be known when it comes back.
    pub(crate) attempts: u32,
    /// What the copy is known by: nobody shall take it for the message.
    pub(crate) id: String,
}

/// The properties and the body of a message, or of a copy of one.
pub(crate) fn write(message: &Message, format: Format, copied: Option<&Copied>) -> (BasicProperties, bytes::Bytes) {
    let mut headers = FieldTable::default();
    let body = NAMES.write(message, format, |name, value| {
        let taken = TAKEN.iter().find(|(taken, _)| *taken == name);
        add(&mut headers, taken.map_or(name, |(_, instead)| instead), value);
    });
    let mut id = message.id().to_string();
    if let Some(copied) = copied {
        add(&mut headers, TOPIC, message.topic().as_str());
        add(&mut headers, DELIVERIES, &copied.deliveries.to_string());
        if copied.attempts > 0 {
            add(&mut headers, ATTEMPTS, &copied.attempts.to_string());
        }
        id.clone_from(&copied.id);
    }
    if body.content_type.len() > MAX_SHORT_STRING_LENGTH {
        add(&mut headers, "cloudEvents_datacontenttype", &body.content_type);
    }
    let mut properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(short(&id))
        .with_content_type(short(&body.content_type))
        .with_type(short(message.kind()))
        .with_headers(headers);
    if let Some(seconds) = message.time().and_then(|time| u64::try_from(time.timestamp()).ok()) {
        properties = properties.with_timestamp(seconds);
    }
    if let Some(source) = message.source() {
        properties = properties.with_app_id(short(source));
    }
    (properties, body.payload)
}

/// What a short text holds of a longer one, which only messages of others have.
fn short(text: &str) -> ShortString {
    let mut end = text.len().min(MAX_SHORT_STRING_LENGTH);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

/// A name that is there already has a list of values: a table has no name twice.
fn add(headers: &mut FieldTable, name: &str, value: &str) {
    let value = AMQPValue::LongString(value.into());
    let value = match headers.inner().get(name) {
        None => value,
        Some(AMQPValue::FieldArray(array)) => {
            let mut values = array.clone();
            values.push(value);
            AMQPValue::FieldArray(values)
        }
        Some(first) => AMQPValue::FieldArray(FieldArray::from(vec![first.clone(), value])),
    };
    headers.insert(short(name), value);
}

/// A message, how often it has been delivered, this time included, and how often it had been tried before it waited.
pub(crate) fn read(
    reader: &mut Reader,
    delivery: Delivery,
    topic_named: impl FnOnce(&str) -> Topic,
) -> (Message, u32, u32) {
    let properties = &delivery.properties;
    let mut reading = reader.begin(&NAMES);
    let (mut topic, mut deliveries, mut attempts) = (None, 0_u32, 0);
    for (name, value) in properties.headers().iter().flat_map(|headers| headers.inner()) {
        let name = name.as_str();
        let name = TAKEN
            .iter()
            .find(|(_, instead)| *instead == name)
            .map_or(name, |(taken, _)| taken);
        match name {
            TOPIC => topic = Some(text(value)),
            DELIVERIES => deliveries = deliveries.saturating_add(number(value)),
            ATTEMPTS => attempts = number(value),
            "x-delivery-count" => deliveries = deliveries.saturating_add(number(value)),
            _ if OF_BROKER.contains(&name) || OF_BROKER_TOO.iter().any(|start| name.starts_with(start)) => {}
            _ => match value {
                AMQPValue::LongString(value) => reading.header(name, value.as_bytes()),
                AMQPValue::FieldArray(values) => {
                    values
                        .as_slice()
                        .iter()
                        .for_each(|value| reading.header(name, text(value).as_bytes()));
                }
                other => reading.header(name, text(other).as_bytes()),
            },
        }
    }
    let name = topic.unwrap_or_else(|| crate::topology::topic_of(delivery.routing_key.as_str()).to_owned());
    let topic = topic_named(&name);
    let arrived = Arrived {
        content_type: properties.content_type().as_ref().map(|text| text.as_str()),
        id: properties.message_id().as_ref().map(|text| text.as_str()),
        kind: properties.kind().as_ref().map(|text| text.as_str()),
        time: properties
            .timestamp()
            .and_then(|seconds| Timestamp::from_timestamp(i64::try_from(seconds).ok()?, 0)),
        ..Arrived::new(&topic, delivery.data)
    };
    (reading.finish(arrived), deliveries.saturating_add(1), attempts)
}

fn number(value: &AMQPValue) -> u32 {
    text(value).parse().unwrap_or(0)
}

fn text(value: &AMQPValue) -> String {
    match value {
        AMQPValue::LongString(text) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        AMQPValue::ByteArray(bytes) => String::from_utf8_lossy(bytes.as_slice()).into_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(n) => n.to_string(),
        AMQPValue::ShortShortUInt(n) => n.to_string(),
        AMQPValue::ShortInt(n) => n.to_string(),
        AMQPValue::ShortUInt(n) => n.to_string(),
        AMQPValue::LongInt(n) => n.to_string(),
        AMQPValue::LongUInt(n) => n.to_string(),
        AMQPValue::LongLongInt(n) => n.to_string(),
        AMQPValue::Timestamp(n) => n.to_string(),
        AMQPValue::Float(n) => n.to_string(),
        AMQPValue::Double(n) => n.to_string(),
        AMQPValue::Void => String::new(),
        // Of no use as a text, but not lost either.
        other => format!("{other:?}"),
    }
}
