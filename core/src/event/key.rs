//! The ordering key that the derive makes of a field or an expression: its text, or none where it is an `Option`.

use std::{borrow::Cow, fmt::Display};

/// A value that is to be a key. Its inherent method is for `Option`s; every other type has the trait's.
#[derive(Debug)]
pub struct KeyOf<'a, T>(pub &'a T);

impl<T: Display> KeyOf<'_, Option<T>> {
    /// No key for `None`: the event is unordered.
    #[must_use]
    pub fn text(&self) -> Option<Cow<'static, str>> {
        self.0.as_ref().map(|value| Cow::Owned(value.to_string()))
    }
}

/// The text of a value that is no `Option`.
pub trait KeyText {
    /// Always a key.
    fn text(&self) -> Option<Cow<'static, str>>;
}

impl<T: Display> KeyText for KeyOf<'_, T> {
    fn text(&self) -> Option<Cow<'static, str>> {
        Some(Cow::Owned(self.0.to_string()))
    }
}
