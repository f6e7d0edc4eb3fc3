//! claude-lb: a small synchronous proxy that spreads Claude Code over several Databricks workspaces.
//!
//! `ARCHITECTURE.md` draws the house. Imports point to rooms further up this list only, which a test checks:
//!
//! | layer | rooms |
//! |---|---|
//! | words, pure | [`secret`], [`http`], [`anthropic`] |
//! | decisions, pure | [`outcome`], [`retry`], [`config`], [`cli`], [`relay`] |
//! | the machine | [`mod@env`], [`panics`] |
//! | shared truth | [`balancer`] |
//! | edges | [`upstream`] (the only room that names ureq), [`front`] (the only one that names tiny_http) |
//! | the path | [`explain`], [`access`], [`messages`], [`routes`], [`admin`] |
//! | assembly | [`app`], [`logging`], [`server`], [`health`], [`demo`], [`program`] |
pub mod access;
pub mod admin;
pub mod anthropic;
pub mod app;
pub mod balancer;
pub mod cli;
pub mod config;
pub mod demo;
pub mod env;
pub mod explain;
pub mod front;
pub mod health;
pub mod http;
pub mod logging;
pub mod messages;
pub mod outcome;
pub mod panics;
pub mod program;
pub mod relay;
pub mod retry;
pub mod routes;
pub mod secret;
pub mod server;
pub mod stack;
pub mod upstream;
