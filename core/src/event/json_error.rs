use std::{error::Error as StdError, fmt};

/// What is wrong with a JSON text, without the values in it: errors are logged, and stored with dead letters, where a
/// payload's card number has no business. It keeps the category, the place, and what the type expected.
///
/// Codecs of your own that use `serde_json` make one of its error: `.map_err(JsonError::from)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonError {
    what: String,
    line: usize,
    column: usize,
}

impl From<serde_json::Error> for JsonError {
    fn from(error: serde_json::Error) -> Self {
        Self::from(&error)
    }
}

impl From<&serde_json::Error> for JsonError {
    fn from(error: &serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let text = text
            .strip_suffix(&format!(" at line {line} column {column}"))
            .unwrap_or(&text);
        let what = if error.is_data() {
            without_values(text)
        } else {
            text.to_owned()
        };
        Self { what, line, column }
    }
}

/// What serde says of a value that a type refused, without the value. What is not one of its own sentences is the text of the
/// type's author, who may have quoted anything.
fn without_values(text: &str) -> String {
    // The names of fields that are missing or twice are the type's own, and so are lengths.
    if ["missing field `", "duplicate field `", "invalid length "]
        .iter()
        .any(|own| text.starts_with(own))
    {
        return text.to_owned();
    }
    // What was expected is said by the type. The value comes before it, and may itself contain such words.
    let expected = text.rfind(", expected ").map_or("", |at| &text[at..]);
    for what in ["unknown field", "unknown variant"] {
        if text.starts_with(what) {
            // The names that there are may be listed: "expected one of `a`, `b`".
            return format!("{what}{expected}");
        }
    }
    for what in ["invalid type: ", "invalid value: "] {
        let Some(value) = text.strip_prefix(what) else { continue };
        // "string "4111…"", "integer `7`", "map", "newtype struct": the kind is in words before the value.
        let kind = value.split(['"', '`', ',']).next().unwrap_or_default().trim_end();
        if KINDS.contains(&kind) {
            return format!("{what}{kind}{expected}");
        }
    }
    "the type refused a value; its reason is left out, since it may quote the value".to_owned()
}

/// What serde calls the kinds of values.
const KINDS: [&str; 17] = [
    "boolean",
    "integer",
    "floating point",
    "character",
    "string",
    "byte array",
    "unit value",
    "null",
    "Option value",
    "newtype struct",
    "sequence",
    "map",
    "enum",
    "unit variant",
    "newtype variant",
    "tuple variant",
    "struct variant",
];

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        match (self.line, self.column) {
            (0, 0) => Ok(()),
            (line, column) => write!(f, " at line {line} column {column}"),
        }
    }
}

impl StdError for JsonError {}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::{Deserialize, Deserializer, de::Error as _};

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Card {
        number: u32,
        kind: Kind,
        short: Option<Short>,
        pair: Option<(u8, u8)>,
    }
    #[derive(Debug, Deserialize)]
    enum Kind {
        Debit,
    }
    #[derive(Debug)]
    struct Short;
    impl<'de> Deserialize<'de> for Short {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            Err(D::Error::custom(format!("{text} is too long, expected {text}")))
        }
    }

    #[test]
    fn no_value_of_the_text_is_quoted() {
        for (text, says) in [
            (
                r#"{"number": "4111"}"#,
                "invalid type: string, expected u32 at line 1 column 17",
            ),
            (
                r#"{"number": "a, expected 4111"}"#,
                "invalid type: string, expected u32 at line 1",
            ),
            (r#"{"number": 411111111111}"#, "invalid value: integer, expected u32"),
            (r#"{"number": 4111.5}"#, "invalid type: floating point, expected u32"),
            (r#"{"number": [4111]}"#, "invalid type: sequence, expected u32"),
            (r#"{"number": {"a": 4111}}"#, "invalid type: map, expected u32"),
            (r#"{"number": null}"#, "invalid type: null, expected u32"),
            (r#"{"number": true}"#, "invalid type: boolean, expected u32"),
            (r#"{"4111": 1}"#, "unknown field, expected one of `number`, `kind`"),
            (r#"{"number": 1, "kind": "4111"}"#, "unknown variant, expected `Debit`"),
            (
                r#"{"number": 1, "kind": 4111}"#,
                "the type refused a value|invalid type: integer|expected",
            ),
            (
                r#"{"number": 1, "short": "4111"}"#,
                "the type refused a value; its reason is left out",
            ),
            (
                r#"{"number": 1, "pair": [41]}"#,
                "invalid length 1, expected a tuple of size 2",
            ),
            (r#"{"number": 1}"#, "missing field `kind`"),
            (r#"{"number": 1, "number": 4111}"#, "duplicate field `number`"),
            (r#"{"number": 4111"#, "EOF while parsing an object at line 1 column 15"),
            (r#"4111 4111"#, "invalid type: integer, expected struct Card"),
            (r#"{"number": 1 4111"#, "expected `,` or `}` at line 1 column 14"),
        ] {
            let error = serde_json::from_str::<Card>(text).unwrap_err();
            let said = JsonError::from(&error).to_string();
            assert!(
                says.split('|').any(|says| said.starts_with(says)),
                "{text}: {said} ({error})"
            );
            assert!(!said.contains("41"), "{text}: {said}");
        }
    }
}
