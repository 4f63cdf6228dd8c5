//! Servers as they are installed, which know nothing of this program.

use std::fs;
use std::time::Duration;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, world};

/// Three upgrades under load, with both engines.
fn upgrades_lose_nothing(world: &World, app: &App) {
    for engine in ["ebpf", "cbpf"] {
        let master = Master::start(world, &app.clone().engine(engine));
        let load = Load::start(spec(world).rate(200.0).burst(50, Duration::from_millis(300)).slow(10));
        for _ in 0..3 {
            master.hup();
            load.answered(100);
        }
        let report = load.end_lossless();
        assert_eq!(report.untagged, report.answers, "answers of this very server");
        master.stop();
    }
}

#[test]
fn nginx() {
    world(&[Need::Nginx, Need::Bpf], |world| {
        let directory = world.path("");
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|what| format!("{what}_temp_path {}{what};", directory.display()));
        let config = format!(
            "user root; worker_processes 2; error_log stderr; events {{ worker_connections 512; }}\n\
             http {{ access_log off; {} server {{ listen {} reuseport; return 200 'as it is\\n'; }} }}\n",
            temporary.join(" "),
            world.address,
        );
        fs::write(world.path("nginx.conf"), config).unwrap();
        // Several nginx at once: each needs a pid file of its own.
        let own = format!("daemon off; pid {}nginx-{{generation}}-{{seat}}.pid;", directory.display());
        let conf = world.path("nginx.conf");
        let app = App::new(world, ["nginx", "-c", conf.to_str().unwrap(), "-e", "stderr", "-g", &own])
            .workers(2)
            .readiness("listen")
            .app("stop_signal = \"SIGQUIT\"");
        upgrades_lose_nothing(world, &app);
    });
}

#[test]
fn gunicorn() {
    world(&[Need::Gunicorn, Need::Bpf], |world| {
        // gunicorn listens long before it has loaded the application.
        let loading = "import time; time.sleep(0.3)\n"; // imitates a large one
        let answering = "def app(environ, start_response):\n    \
            start_response('200 OK', [('Content-Length', '3')])\n    return [b'ok\\n']\n";
        fs::write(world.path("slowly.py"), loading.to_owned() + answering).unwrap();
        let directory = world.path("");
        let options = ["--reuse-port", "--bind", "{address.default}", "--workers", "1", "--threads", "8"];
        let rest = ["--chdir", directory.to_str().unwrap(), "slowly:app"];
        let app = App::new(world, ["gunicorn"].into_iter().chain(options).chain(rest))
            .workers(2)
            .readiness("listen");
        upgrades_lose_nothing(world, &app);
    });
}
