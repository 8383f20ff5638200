//! Typed events, and their way into a [`Message`].

mod codec;
mod json_error;
mod key;

pub use codec::{Codec, Json};
pub use json_error::JsonError;
#[doc(hidden)]
pub use key::{KeyOf, KeyText};

use crate::{AttributeValue, Message, Result, Topic, message::Text};
use std::{any::Any, borrow::Cow, fmt};

/// A typed event. Derive it:
///
/// ```
/// # mod postrider { pub use postrider_core::*; }
/// use postrider::Event;
/// #[derive(serde::Serialize, serde::Deserialize, Event)]
/// # #[event(crate = "postrider_core")]
/// #[event(name = "order.placed", topic = "orders", version = 2, key = "customer")]
/// struct OrderPlaced {
///     id: u64,
///     customer: String,
/// }
/// assert_eq!(OrderPlaced::kind(), "order.placed.v2");
///
/// // One that others have named, with attributes of CloudEvents.
/// #[derive(serde::Serialize, serde::Deserialize, Event)]
/// # #[event(crate = "postrider_core")]
/// #[event(name = "shipment.sent", type = "com.example.shipment.sent")]
/// #[event(attribute(tenantid = "tenant", priority = |e: &Self| e.priority))]
/// struct ShipmentSent {
///     tenant: String,
///     priority: i32,
/// }
/// assert_eq!(ShipmentSent::kind(), "com.example.shipment.sent");
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an event",
    label = "not an event",
    note = "add `#[derive(Event)]` and `#[event(name = \"…\")]` to `{Self}`"
)]
pub trait Event: Sized + Send + Sync + 'static {
    /// What happened, such as `order.placed`: with the version it is the message's type.
    const NAME: &'static str;
    /// The version of its shape, from 1. Receivers compare it whole: another version is another type.
    const VERSION: u16 = 1;
    /// Where it goes; the derive takes the name unless told. Types that need one order share a topic.
    const TOPIC: Topic;
    /// Whether events of this type have an ordering key, so that a subscription knows to ask for order.
    const KEYED: bool = false;
    /// How it is written: [`Json`] unless `#[event(codec = …)]` says otherwise. The serde bounds live here.
    type Codec: Codec<Self>;

    /// The ordering key of this event: one to 512 bytes; `None` is unordered.
    fn key(&self) -> Option<Cow<'_, str>> {
        None
    }

    /// The attributes of CloudEvents that go with this event: extensions, `subject`, `dataschema`.
    fn attributes(&self) -> Vec<(Text, AttributeValue)> {
        Vec::new()
    }

    /// The message's type: `<name>.v<version>`, unless another is given for an event that others have named. The derive makes it
    /// a constant.
    #[must_use]
    fn kind() -> Cow<'static, str> {
        Cow::Owned(format!("{}.v{}", Self::NAME, Self::VERSION))
    }
}

/// [`Event`] as an object: for batches of several types, and for middleware that sees every event.
pub trait DynEvent: Send + Sync {
    /// The message's type, `<name>.v<version>`.
    fn kind(&self) -> Cow<'static, str>;
    /// Where it goes.
    fn topic(&self) -> Topic;
    /// The ordering key.
    fn key(&self) -> Option<Cow<'_, str>>;
    /// The wire form, with a fresh id.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if the codec cannot encode it.
    fn to_message(&self) -> Result<Message>;
    /// For a downcast to the event's type.
    fn as_any(&self) -> &dyn Any;
}

impl<E: Event> DynEvent for E {
    fn kind(&self) -> Cow<'static, str> {
        E::kind()
    }
    fn topic(&self) -> Topic {
        E::TOPIC
    }
    fn key(&self) -> Option<Cow<'_, str>> {
        Event::key(self)
    }
    fn to_message(&self) -> Result<Message> {
        let payload = E::Codec::encode(self)?;
        let message = Message::new(E::TOPIC, E::kind(), payload).with_content_type(E::Codec::CONTENT_TYPE);
        let message = match Event::key(self) {
            None => message,
            Some(key) => message.with_key(key),
        };
        let attributes = self.attributes().into_iter();
        Ok(attributes.fold(message, |message, (name, value)| message.with_attribute(name, value)))
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A decoded event of some type, as code that is not about one type sees it.
pub struct AnyEvent(Box<dyn DynEvent>);

impl AnyEvent {
    /// Hides the type.
    #[must_use]
    pub fn new<E: Event>(event: E) -> Self {
        Self(Box::new(event))
    }
    /// The message's type, `<name>.v<version>`.
    #[must_use]
    pub fn kind(&self) -> Cow<'static, str> {
        self.0.kind()
    }
    /// Where it goes.
    #[must_use]
    pub fn topic(&self) -> Topic {
        self.0.topic()
    }
    /// The event, if it is an `E`.
    #[must_use]
    pub fn downcast_ref<E: Event>(&self) -> Option<&E> {
        self.0.as_any().downcast_ref()
    }
}

impl fmt::Debug for AnyEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnyEvent({})", self.kind())
    }
}

/// What `publish` takes: `&event`, `&dyn DynEvent`, or a [`Message`] put together by hand.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be published",
    label = "expected `&event` or a `Message`",
    note = "events are published by reference: `bus.publish(&event)`; the type needs `#[derive(Event)]`"
)]
pub trait IntoMessage: Send {
    /// The wire form.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) if the event cannot be encoded.
    fn into_message(self) -> Result<Message>;
}

impl<E: Event> IntoMessage for &E {
    fn into_message(self) -> Result<Message> {
        self.to_message()
    }
}
impl IntoMessage for &dyn DynEvent {
    fn into_message(self) -> Result<Message> {
        self.to_message()
    }
}
impl IntoMessage for Message {
    fn into_message(self) -> Result<Message> {
        Ok(self)
    }
}
