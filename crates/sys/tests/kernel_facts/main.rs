//! What the running kernel does, asserted: the facts that the simulated kernel of the core's tests and the
//! promises of the program stand on. A fact that stops being true here is a change of design, not of a test.
//!
//! Facts that need privilege say `SKIPPED` on standard error without it; with
//! `REUSEPORTD_TEST_REQUIRE=all` in the environment that is a failure.
#![allow(unsafe_code, reason = "tests make namespaces and change users, for which there is no safe call")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, like the tests themselves")]

mod bind;
mod datagrams;
mod flows;
mod handover;
mod image;
mod late;
mod overlap;
mod process;
mod processors;
mod slots;
mod steering;
mod strangers;
mod users;
mod world;
