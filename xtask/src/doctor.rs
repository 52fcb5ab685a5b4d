//! `cargo xtask doctor`: what is there, what is missing and how to get it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::bochs::{self, Bochs};
use crate::cache;
use crate::console;
use crate::firmware::{self, Uefi};
use crate::qemu::{self, Qemu};

/// One line of the report.
struct Finding {
    what: &'static str,
    state: State,
    text: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// There.
    Found,
    /// Not there, but not needed or fetched when it is.
    Optional,
    /// Without it nothing runs.
    Missing,
}

/// Prints the report.
///
/// # Errors
/// If a run is impossible.
pub fn run() -> Result<()> {
    let findings = [toolchain(), linker(), bochs(), mmdebstrap(), qemu(), uefi(), linux(), kvm()];
    for Finding { what, state, text } in &findings {
        let mark = match state {
            State::Found => "ok",
            State::Optional => "-",
            State::Missing => "MISSING",
        };
        println!("{mark:<8} {what:<12} {text}");
    }
    let machine = if qemu::nested_kvm().is_ok() { "QEMU with KVM" } else { "Bochs" };
    println!("\n`cargo xtask run` uses {machine} here.");
    let missing: Vec<&str> =
        findings.iter().filter(|one| one.state == State::Missing).map(|one| one.what).collect();
    if !missing.is_empty() {
        bail!("nothing can run without: {}", missing.join(", "));
    }
    Ok(())
}

fn toolchain() -> Finding {
    let what = "Rust";
    let version = console::capture(Command::new("rustc").arg("--version"));
    match version {
        Ok(output) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Finding { what, state: State::Found, text }
        }
        _ => Finding {
            what,
            state: State::Missing,
            text: "install rustup; it fetches the toolchain of rust-toolchain.toml".to_owned(),
        },
    }
}

/// Host programs and the shim are linked by the C compiler; what runs on the bare machine is not.
fn linker() -> Finding {
    let what = "C linker";
    match cache::in_path("cc") {
        Some(path) => Finding { what, state: State::Found, text: path.display().to_string() },
        None => Finding {
            what,
            state: State::Missing,
            text: "install a C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)".to_owned(),
        },
    }
}

fn bochs() -> Finding {
    let what = "Bochs";
    let on_host = Bochs::on_host();
    let (state, text) = match (&on_host, Bochs::in_cache()) {
        (Ok(bochs), _) => (State::Found, bochs.to_string()),
        (Err(why), Ok(bochs)) => (State::Found, format!("{bochs}; the host's: {why:#}")),
        (Err(why), Err(cached)) => {
            let oldest = bochs::OLDEST;
            let text = format!(
                "{oldest} or newer is needed; the host's: {why:#}; the cached one: {cached:#}"
            );
            if cache::in_path("mmdebstrap").is_some() || cache::may_install() {
                (State::Optional, format!("{text}; the first run fetches it"))
            } else {
                (
                    State::Missing,
                    format!("{text}; to let the first run fetch it, {}", cache::INSTALL_MMDEBSTRAP),
                )
            }
        }
    };
    Finding { what, state, text }
}

fn mmdebstrap() -> Finding {
    let text = match cache::in_path("mmdebstrap") {
        Some(path) => {
            return Finding {
                what: "mmdebstrap",
                state: State::Found,
                text: path.display().to_string(),
            };
        }
        None if cache::existing().is_some() => {
            "not needed: the emulators are in the cache".to_owned()
        }
        None if cache::may_install() => "the first run installs it with apt-get".to_owned(),
        None => format!("to fetch the emulators: {}", cache::INSTALL_MMDEBSTRAP),
    };
    Finding { what: "mmdebstrap", state: State::Optional, text }
}

fn qemu() -> Finding {
    let what = "QEMU";
    match Qemu::existing().map(|qemu| qemu.version()) {
        Some(Ok(text)) => Finding { what, state: State::Found, text },
        Some(Err(why)) => Finding { what, state: State::Optional, text: format!("{why:#}") },
        None => {
            Finding { what, state: State::Optional, text: "fetched together with Bochs".to_owned() }
        }
    }
}

/// What `--firmware uefi` boots with.
fn uefi() -> Finding {
    let what = "UEFI";
    let (state, text) = match (Uefi::on_host(), Uefi::in_cache()) {
        (Some(host), _) if matches!(Qemu::existing(), Some(Qemu::Host(_))) => {
            (State::Found, host.to_string())
        }
        (_, Some(cached)) => (State::Found, cached.to_string()),
        _ => (State::Optional, format!("fetched together with Bochs; or {}", firmware::INSTALL)),
    };
    Finding { what, state, text }
}

fn linux() -> Finding {
    let what = "Linux";
    match cache::existing_linux() {
        Some(path) => Finding { what, state: State::Found, text: path.display().to_string() },
        None => {
            let text = "fetched for `test --nested` and `bench --peer kvm`".to_owned();
            Finding { what, state: State::Optional, text }
        }
    }
}

fn kvm() -> Finding {
    let what = "Nested KVM";
    match qemu::nested_kvm() {
        Ok(()) => Finding { what, state: State::Found, text: "usable".to_owned() },
        Err(why) => Finding { what, state: State::Optional, text: format!("{why:#}") },
    }
}
