//! The mistakes users make, and what the compiler says to them.
//!
//! The texts are those of one compiler version; `TRYBUILD=overwrite cargo test --workspace --test compile` writes them anew.

#[test]
fn mistakes_are_explained() {
    trybuild::TestCases::new().compile_fail("tests/compile/*.rs");
}
