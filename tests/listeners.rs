//! Addresses that come and go with a generation.

use std::net::SocketAddr;

use reuseportd_wire::status::Outcome;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, world};

fn named(name: &str, address: &str) -> (String, SocketAddr) {
    (name.to_owned(), address.parse().unwrap())
}

fn names(master: &Master) -> Vec<String> {
    master.status().listeners.into_iter().map(|listener| listener.name).collect()
}

fn load_on(world: &World, address: SocketAddr) -> Load {
    let mut spec = spec(world).rate(200.0).slow(5);
    spec.target = address;
    Load::start(spec)
}

fn a_listener_comes_and_goes(engine: &'static str, mode: &str) {
    world(&[Need::Root, Need::Bpf], |world| {
        let mut app = App::test_worker(world, &format!("--mode {mode} --accept-delay 2")).engine(engine);
        let master = Master::start(world, &app);
        let load = load_on(world, world.address);
        app.listen.push(named("second", "127.0.0.1:8081"));
        app.write();
        master.upgrade();
        assert_eq!(names(&master), ["default", "second"]);
        app.listen.remove(0);
        load.end_lossless();

        let load = load_on(world, app.listen[0].1);
        app.write();
        master.upgrade();
        assert_eq!(names(&master), ["second"]);
        load.answered(50);
        load.end_lossless();
        // Nobody is to serve it any more: refusal is right.
        let refused = std::net::TcpStream::connect(world.address).map_err(|error| error.kind());
        assert!(matches!(refused, Err(std::io::ErrorKind::ConnectionRefused)), "{refused:?}");
        master.stop();
    });
}

#[test]
fn a_listener_comes_and_goes_sdk_ebpf() {
    a_listener_comes_and_goes("ebpf", "sdk");
}

#[test]
fn a_listener_comes_and_goes_sdk_cbpf() {
    a_listener_comes_and_goes("cbpf", "sdk");
}

#[test]
fn a_listener_comes_and_goes_unmodified_ebpf() {
    a_listener_comes_and_goes("ebpf", "plain");
}

#[test]
fn a_listener_comes_and_goes_unmodified_cbpf() {
    a_listener_comes_and_goes("cbpf", "plain");
}

#[test]
fn an_address_that_overlaps_a_served_one_is_refused() {
    world(&[Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        for overlapping in ["0.0.0.0:8080", "[::]:8080"] {
            app.listen = vec![named("default", overlapping)];
            app.write();
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{overlapping}: {reason}");
            assert!(reason.contains(overlapping), "{overlapping}: {reason}");
        }
        assert_eq!(master.status().active_generation, Some(1));
        master.stop();
    });
}
