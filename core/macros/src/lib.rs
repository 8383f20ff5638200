//! `#[derive(Event)]`. Documented where it is used: at `postrider::Event`.

use proc_macro::TokenStream;
use proc_macro2::TokenStream as Tokens;
use quote::{quote, quote_spanned};
use syn::{
    Data, DeriveInput, Error, Expr, ExprLit, Ident, Lit, LitInt, LitStr, Member, Path, Result, parse_macro_input,
    spanned::Spanned,
};

/// Makes a type an event.
///
/// `#[event(…)]` takes
/// - `name = "order.placed"`, what happened (required),
/// - `topic = "orders"`, where it goes; the name unless given,
/// - `version = 2`, from 1 to 65535; 1 unless given,
/// - `type = "com.example.thing"`, the CloudEvents type in full, for an event that others have named; `<name>.v<version>` unless
///   given,
/// - `attribute(tenantid = "field", level = |e: &Self| …)`, attributes of CloudEvents: each the value of a field or of an
///   expression,
/// - `key = "field"`, the ordering key as the text of a field, or `key = |e: &Self| …` for any expression; where it is an
///   `Option`, `None` is an event without a key,
/// - `codec = path::To`, how it is written; JSON unless given,
/// - `crate = "path"`, where Postrider is, if it is not at `::postrider`.
#[proc_macro_derive(Event, attributes(event))]
pub fn event(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(Error::into_compile_error).into()
}

#[derive(Default)]
struct Options {
    name: Option<LitStr>,
    topic: Option<LitStr>,
    version: Option<LitInt>,
    key: Option<Expr>,
    kind: Option<LitStr>,
    attributes: Vec<(Ident, Expr)>,
    codec: Option<Path>,
    krate: Option<Path>,
}

impl Options {
    fn of(input: &DeriveInput) -> Result<Self> {
        let mut options = Self::default();
        for attribute in input.attrs.iter().filter(|a| a.path().is_ident("event")) {
            attribute.parse_nested_meta(|meta| {
                let name = meta.path.get_ident().map(ToString::to_string).unwrap_or_default();
                let twice = || meta.error(format!("`{name}` is given twice"));
                match name.as_str() {
                    "name" => set(&mut options.name, meta.value()?.parse()?, twice),
                    "topic" => set(&mut options.topic, meta.value()?.parse()?, twice),
                    "version" => set(&mut options.version, meta.value()?.parse()?, twice),
                    "key" => set(&mut options.key, meta.value()?.parse()?, twice),
                    "type" => set(&mut options.kind, meta.value()?.parse()?, twice),
                    "attribute" => meta.parse_nested_meta(|attribute| {
                        let name = attribute.path.require_ident()?.clone();
                        if let Some(why) = attribute_problem(&name.to_string()) {
                            return Err(Error::new(name.span(), why));
                        }
                        options.attributes.push((name, attribute.value()?.parse()?));
                        Ok(())
                    }),
                    "codec" => set(&mut options.codec, meta.value()?.parse()?, twice),
                    "crate" => {
                        let path: LitStr = meta.value()?.parse()?;
                        set(&mut options.krate, path.parse()?, twice)
                    }
                    _ => {
                        Err(meta
                            .error("unknown option: known are `name`, `topic`, `version`, `key`, `type`, `attribute`, `codec` and `crate`"))
                    }
                }
            })?;
        }
        Ok(options)
    }
}

fn set<T>(slot: &mut Option<T>, value: T, twice: impl FnOnce() -> Error) -> Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(twice()),
    }
}

fn expand(input: &DeriveInput) -> Result<Tokens> {
    let options = Options::of(input)?;
    let Some(name) = &options.name else {
        return Err(Error::new(
            input.ident.span(),
            format!(
                "an event needs a name: `#[event(name = \"{}\")]`",
                dotted(&input.ident.to_string())
            ),
        ));
    };
    for literal in options.topic.iter().chain([name]) {
        if let Some(why) = name_problem(&literal.value()) {
            let text = format!("names of events and topics have 1 to 200 bytes of A-Z a-z 0-9 . _ -: {why}");
            return Err(Error::new(literal.span(), text));
        }
    }
    let version = version(options.version.as_ref())?;
    let krate = options.krate.map_or_else(|| quote!(::postrider), |path| quote!(#path));
    let topic = options.topic.as_ref().unwrap_or(name);
    let topic = quote_spanned!(topic.span()=> #krate::Topic::new(#topic));
    let codec = options.codec.map_or_else(|| quote!(#krate::Json), |path| quote!(#path));
    let keyed = options.key.is_some();
    let key = options.key.map(|key| key_method(input, key, &krate)).transpose()?;
    let kind = match &options.kind {
        Some(kind) if kind.value().is_empty() || kind.value().len() > 255 => {
            return Err(Error::new(kind.span(), "a type has 1 to 255 bytes"));
        }
        Some(kind) => kind.value(),
        None => format!("{}.v{version}", name.value()),
    };
    let attributes = attributes_method(input, options.attributes, &krate)?;
    let ty = &input.ident;
    let (generics, arguments, bounds) = input.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #generics #krate::Event for #ty #arguments #bounds {
            const NAME: &'static str = #name;
            const VERSION: u16 = #version;
            const TOPIC: #krate::Topic = #topic;
            const KEYED: bool = #keyed;
            type Codec = #codec;
            #key
            #attributes
            fn kind() -> ::std::borrow::Cow<'static, str> {
                ::std::borrow::Cow::Borrowed(#kind)
            }
        }
    })
}

/// The rules of `Topic::new`, told at the literal.
fn name_problem(name: &str) -> Option<&'static str> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 200 {
        Some("this one is empty or longer")
    } else if !name.chars().all(is_allowed) {
        Some("this one has another character")
    } else if name.split('.').any(str::is_empty) {
        Some("this one has an empty segment before, after or between dots")
    } else {
        None
    }
}

fn version(given: Option<&LitInt>) -> Result<u16> {
    let Some(literal) = given else { return Ok(1) };
    match literal.base10_parse::<u16>() {
        Ok(version) if version > 0 => Ok(version),
        _ => Err(Error::new(literal.span(), "a version is a number from 1 to 65535")),
    }
}

fn key_method(input: &DeriveInput, key: Expr, krate: &Tokens) -> Result<Tokens> {
    let value = match key {
        Expr::Lit(ExprLit {
            lit: Lit::Str(field), ..
        }) => {
            let member = member(input, &field, "key")?;
            quote_spanned!(field.span()=> #krate::event::KeyOf(&self.#member).text())
        }
        expression => {
            quote_spanned!(expression.span()=> #krate::event::KeyOf(&(#expression)(self)).text())
        }
    };
    Ok(quote! {
        #[allow(clippy::redundant_closure_call)]
        fn key(&self) -> ::core::option::Option<::std::borrow::Cow<'_, str>> {
            #[allow(unused_imports)]
            use #krate::event::KeyText as _;
            #value
        }
    })
}

/// The rules of `Message::with_attribute`, told at the name.
fn attribute_problem(name: &str) -> Option<&'static str> {
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
    if !name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    {
        Some("names of attributes have only the letters a to z and digits")
    } else if OWN.contains(&name) {
        Some("this attribute has a meaning of its own in CloudEvents: it is set by other means")
    } else {
        None
    }
}

fn attributes_method(input: &DeriveInput, attributes: Vec<(Ident, Expr)>, krate: &Tokens) -> Result<Option<Tokens>> {
    if attributes.is_empty() {
        return Ok(None);
    }
    let values = attributes.into_iter().map(|(name, value)| {
        let text = name.to_string();
        let value = match value {
            Expr::Lit(ExprLit {
                lit: Lit::Str(field), ..
            }) => {
                let member = member(input, &field, "attribute")?;
                quote_spanned!(field.span()=> ::core::clone::Clone::clone(&self.#member))
            }
            expression => quote_spanned!(expression.span()=> (#expression)(self)),
        };
        Ok(quote!((#krate::message::Text::from_static(#text), #krate::AttributeValue::from(#value))))
    });
    let values: Vec<Tokens> = values.collect::<Result<_>>()?;
    Ok(Some(quote! {
        #[allow(clippy::redundant_closure_call)]
        fn attributes(&self) -> ::std::vec::Vec<(#krate::message::Text, #krate::AttributeValue)> {
            ::std::vec![#(#values),*]
        }
    }))
}

/// The field called `field`, or an error that lists those there are.
fn member(input: &DeriveInput, field: &LitStr, what: &str) -> Result<Member> {
    let wanted = field.value();
    let Data::Struct(data) = &input.data else {
        return Err(Error::new(
            field.span(),
            format!("a field can be the {what} of a struct only: use an expression, `{what} = |e: &Self| …`"),
        ));
    };
    let members: Vec<Member> = data.fields.members().collect();
    let text = |m: &Member| match m {
        Member::Named(name) => name.to_string(),
        Member::Unnamed(index) => index.index.to_string(),
    };
    if let Some(found) = members.iter().find(|m| text(m) == wanted) {
        return Ok(match found {
            Member::Named(name) => Member::Named(Ident::new(&name.to_string(), field.span())),
            unnamed => unnamed.clone(),
        });
    }
    let known: Vec<String> = members.iter().map(|m| format!("`{}`", text(m))).collect();
    Err(Error::new(
        field.span(),
        format!(
            "`{}` has no field `{wanted}` to be its {what}: it has {}",
            input.ident,
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        ),
    ))
}

/// `OrderPlaced` → `order.placed`, for the hint.
fn dotted(ident: &str) -> String {
    let mut text = String::new();
    for c in ident.chars() {
        if c.is_uppercase() && !text.is_empty() {
            text.push('.');
        }
        text.extend(c.to_lowercase());
    }
    text
}
