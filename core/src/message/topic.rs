use super::Text;
use crate::{Error, ErrorKind, Result};
use std::{borrow::Cow, fmt};

/// The most bytes a topic may have.
pub const MAX_TOPIC_BYTES: usize = 200;
/// The most bytes an ordering key may have.
pub const MAX_KEY_BYTES: usize = 512;

/// Where events go: a validated name, dotted, such as `orders.placed`.
///
/// One to [200](MAX_TOPIC_BYTES) bytes of `[A-Za-z0-9._-]` with no empty segment: what every broker can carry as it is.
/// Cheap to clone. [`Topic::new`] is `const`, so that a wrong literal does not compile where it is a constant.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Text);

/// The name of a consumer group, with the same rules as a topic's.
///
/// Every group gets every message of its topics once; the members of a group share them.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupName(Text);

/// The name of a route: one of the outboxes of a log, with the same rules as a topic's.
///
/// `default`, whatever the transport; more than one only where topics go to several transports.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteName(Text);

fn parse(what: &'static str, name: Cow<'static, str>) -> Result<Text> {
    match problem(&name) {
        None => Ok(name.into()),
        Some(why) => {
            let shown = format!("{:?}", shortened(&name));
            Err(Error::new(ErrorKind::Invalid, format!("not a {what}: {why}")).with("name", shown))
        }
    }
}

const fn problem(name: &str) -> Option<&'static str> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Some("it is empty");
    }
    if bytes.len() > MAX_TOPIC_BYTES {
        return Some("it has more than 200 bytes");
    }
    let mut i = 0;
    while i < bytes.len() {
        let b = bytes[i];
        if !(b.is_ascii_alphanumeric() || b == b'.' || b == b'_' || b == b'-') {
            return Some("it may contain only the characters A-Z a-z 0-9 . _ -");
        }
        if b == b'.' && (i == 0 || i + 1 == bytes.len() || bytes[i - 1] == b'.') {
            return Some("it has an empty segment before, after or between dots");
        }
        i += 1;
    }
    None
}

/// The text of a panic that a constant may have, too.
struct Told {
    bytes: [u8; Told::MOST],
    len: usize,
}

impl Told {
    const MOST: usize = 256;
    /// So many bytes of a name are shown.
    const SHOWN: usize = 64;

    const fn new(what: &str, name: &str, why: &str) -> Self {
        let told = Self {
            bytes: [0; Self::MOST],
            len: 0,
        };
        let told = told.with(what.as_bytes(), Self::MOST).with(b"`", 1);
        let told = told.with(name.as_bytes(), Self::SHOWN);
        let told = if name.len() > Self::SHOWN {
            told.with("…".as_bytes(), 3)
        } else {
            told
        };
        told.with(b"`: ", 3).with(why.as_bytes(), Self::MOST)
    }

    /// At most `most` bytes, to the last whole character of them.
    const fn with(mut self, text: &[u8], most: usize) -> Self {
        let mut end = if text.len() < most { text.len() } else { most };
        while end < text.len() && end > 0 && text[end] & 0b1100_0000 == 0b1000_0000 {
            end -= 1;
        }
        let mut at = 0;
        while at < end && self.len < Self::MOST {
            self.bytes[self.len] = text[at];
            self.len += 1;
            at += 1;
        }
        self
    }
}

#[track_caller]
#[allow(clippy::panic)]
const fn panic_with(told: &Told) -> ! {
    let (text, _) = told.bytes.split_at(told.len);
    match std::str::from_utf8(text) {
        Ok(text) => panic!("{}", text),
        Err(_) => panic!("not a name"),
    }
}

/// A name as an error shows it: hostile ones can be long.
pub(crate) fn shortened(text: &str) -> String {
    const SHOWN: usize = 64;
    match text.char_indices().nth(SHOWN) {
        None => text.to_owned(),
        Some((cut, _)) => format!("{}… ({} bytes)", &text[..cut], text.len()),
    }
}

macro_rules! name_type {
    ($type:ident, $what:literal) => {
        impl $type {
            #[doc = concat!("A ", $what, " from a literal.")]
            ///
            /// # Panics
            /// If the name breaks the rules; in a constant that is a compile error.
            #[must_use]
            #[allow(clippy::panic)]
            #[track_caller]
            pub const fn new(name: &'static str) -> Self {
                match problem(name) {
                    None => Self(Text::from_static(name)),
                    // What a constant is evaluated with formats nothing: the parts are put together by hand.
                    Some(why) => panic_with(&Told::new(concat!("not a ", $what, ": "), name, why)),
                }
            }

            #[doc = concat!("A ", $what, " from a run-time value, checked.")]
            ///
            /// # Errors
            /// [`ErrorKind::Invalid`] that says which rule `name` breaks.
            pub fn parse(name: impl Into<Cow<'static, str>>) -> Result<Self> {
                parse($what, name.into()).map(Self)
            }

            /// The name.
            #[must_use]
            pub fn as_str(&self) -> &str {
                self.0.as_str()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.as_str())
            }
        }
        impl std::str::FromStr for $type {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::parse(name.to_owned())
            }
        }
        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }
    };
}
name_type!(Topic, "topic");
name_type!(GroupName, "group name");
name_type!(RouteName, "route name");

impl RouteName {
    /// The route there always is.
    pub const DEFAULT: Self = Self::new("default");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_literal_is_shown_in_the_panic() {
        let long: &'static str = "ä".repeat(200).leak();
        for (name, says) in [
            (
                "orders placed",
                "not a topic: `orders placed`: it may contain only the characters",
            ),
            ("", "not a topic: ``: it is empty"),
            (long, "…`: it has more than 200 bytes"),
        ] {
            let panic = std::panic::catch_unwind(|| Topic::new(name)).unwrap_err();
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(text.contains(says) && text.len() < 200, "{text}");
        }
        let group = std::panic::catch_unwind(|| GroupName::new("a b")).unwrap_err();
        assert!(
            group
                .downcast_ref::<String>()
                .unwrap()
                .starts_with("not a group name: `a b`")
        );
    }

    #[test]
    fn names_are_checked() {
        for good in ["a", "orders.placed", "A-b_9.c"] {
            assert_eq!(Topic::parse(good.to_owned()).unwrap(), Topic::parse(good).unwrap());
        }
        let long = "x".repeat(201);
        for (bad, why) in [
            ("", "empty"),
            (".a", "segment"),
            ("a.", "segment"),
            ("a..b", "segment"),
            ("a b", "characters"),
            ("ä", "characters"),
            ("a\0", "characters"),
            (long.as_str(), "200 bytes"),
        ] {
            let error = Topic::parse(bad.to_owned()).unwrap_err();
            assert!(error.to_string().contains(why), "{bad:?}: {error}");
            assert!(error.to_string().len() < 300);
        }
    }
}
