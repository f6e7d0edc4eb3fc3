//! claude-lb: a small synchronous proxy that spreads Claude Code over several Databricks workspaces.
//!
//! `ARCHITECTURE.md` draws the house. Imports point down this list only, which a test checks:
//!
//! | layer | rooms |
//! |---|---|
//! | words, pure | [`secret`], [`http`], [`anthropic`] |
//! | decisions, pure | [`outcome`], [`retry`], `balancer::{strategy, breaker, cooldown}` |
//! | what the operator wrote | [`config`], [`cli`] |
//! | the machine | [`env`], [`logging`] |
//! | shared truth | [`balancer`] |
//! | edges | [`upstream`] (the only room that names ureq), [`front`] (the only one that names tiny_http) |
//! | the path | [`relay`], [`messages`], [`routes`], [`admin`] |
//! | assembly | [`server`], [`demo`], [`health`] |

pub mod anthropic;
pub mod cli;
pub mod config;
pub mod env;
pub mod secret;
