//! The words of Anthropic's Messages API: bytes in, values out. Pure; knows no clock, socket, lock or log.

pub mod body;
pub mod json;

#[cfg(test)]
mod samples;
