//! The words of Anthropic's Messages API: bytes in, values out. Pure; knows no clock, socket, lock or log.

pub mod body;
pub mod compat;
pub mod edit;
pub mod error;
pub mod json;
pub mod model;
pub mod session;
pub mod sse;
pub mod tokens;

#[cfg(test)]
mod samples;
