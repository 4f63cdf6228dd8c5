//! The program as its users meet it: real masters, real workers, a load that counts each connection's fate.
//!
//! One binary, so that the harness is compiled once. Each test has a network namespace and a directory of its own.
//! `REUSEPORTD_TEST_REQUIRE=all` turns skipped tests into failures, `REUSEPORTD_TEST_LONG=1` makes the long runs long.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "in a test a surprise is a failure")]

mod adoption;
mod bake;
mod canary;
mod capabilities;
mod cli;
mod config;
mod container;
mod cpu_policy;
mod crash;
mod doctor;
mod failed_upgrade;
mod faults;
mod force_reuseport;
mod half_open;
mod http_readiness;
mod identity;
mod keeper;
mod launch;
mod listeners;
mod matrix;
mod notify;
mod orphans;
mod queue;
mod readiness;
mod real_servers;
mod receipts;
mod reexec;
mod restart_worker;
mod rollback;
mod rolling;
mod scale;
mod sdk;
mod seats;
mod security;
mod server_starter;
mod soak;
mod socket_activation;
mod sockets;
mod stop;
mod stranger;
mod strays;
mod support;
mod systemd;
mod takeover;
mod tidy;
mod udp;
mod udp_workers;
mod unix_sockets;
mod unprivileged;
mod upgrade;
mod watchdog;
