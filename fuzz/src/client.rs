//! Of the clients only their words, which the config's errors use.

#[path = "../../src/client/text.rs"]
pub(crate) mod text;
