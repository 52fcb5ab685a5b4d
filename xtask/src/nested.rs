//! QEMU and KVM in the reference machine: what runs in them is measured, and compared with what it is
//! to do.
//!
//! The machine's Linux is L0. What QEMU runs is either this project's hypervisor (L1) with its guests (L2), or a test
//! guest directly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::cache::{self, Root};
use crate::config::Setup;
use crate::console::Step;
use crate::events::{self, Event};
use crate::linux::{End, Left, Linux, OUTLETS, program_files};
use crate::machine::{
    Accelerator, DISK, Directory, EVENTS, Exit, MachineConfig, RunOutcome, SERIAL,
};
use crate::qemu::Qemu;
use crate::system::System;

/// What QEMU reads besides its libraries, relative to the root.
const QEMU_FILES: [&str; 5] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/seabios/vgabios-stdvga.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
];
/// L0's memory: half of it for its files, and as much again for QEMU and its guest.
const MEMORY_MIB: u32 = 1024;
/// Instructions a second of machine time: L0 and the firmware of L1 wait by the clock, and serial ports
/// too; yet an interrupt of L0's timer, 250 a second, must be a small part of what it does.
const IPS: u32 = 20_000_000;
/// For where L0 says nothing, on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(240);
/// Memory of a guest that QEMU runs directly, in MiB.
const GUEST_MIB: u32 = 64;

/// L0's options: no mitigations of speculation, for a shorter run.
pub const MITIGATIONS_OFF: &str = "mitigations=off";

/// The hypervisor's run in QEMU in L0.
#[derive(Debug)]
pub struct Nested {
    /// The hypervisor's run as in any machine. The ground truth is all that the reference machine saw:
    /// split locks of L2 are in VMX non-root operation there too.
    pub outcome: RunOutcome,
    /// What L0 said.
    pub console: String,
    /// How QEMU ended.
    pub end: End,
}

/// L0: its Linux' options, and the parameters of its `kvm-intel` besides `nested=1`.
#[derive(Clone, Copy, Debug, Default)]
pub struct L0<'a> {
    /// Words for the kernel's command line.
    pub options: &'a str,
    /// Parameters of the module.
    pub kvm: &'a str,
}

/// Runs the hypervisor with this setup in QEMU with KVM, by the command that `cargo xtask run --machine
/// qemu` uses, in this L0.
///
/// # Errors
/// If L0 cannot be run, or the events cannot be read. However QEMU ends is an outcome.
pub fn run(system: &System, setup: &Setup, l0: L0) -> Result<Nested> {
    let root = cache::ensure()?;
    let directory = Directory::new()?;
    let disk = directory.file(DISK);
    system.disk(setup, &disk)?;
    let config = MachineConfig::default();
    let mut command = Qemu::Cache(root.clone()).machine(
        &config,
        Accelerator::Kvm,
        None,
        DISK,
        [SERIAL, EVENTS],
        None,
    );
    command.arg("-no-reboot");

    let step = Step::start("QEMU and KVM in the reference machine");
    let left = Linux {
        files: files(&root, [disk])?,
        outlets: [SERIAL, EVENTS].map(|name| directory.file(name)),
        programs: vec![(directory.path().to_owned(), words(&command))],
        kvm: format!("nested=1 {}", l0.kvm),
        ..linux(l0.options)
    }
    .run(&step)?;
    step.done();
    let Left { console, ends, outlets: [serial, events], truth } = left;
    let truth = truth.into_iter().flatten().collect();
    let (end, exit) = match ends[0] {
        end @ End::Exit(0) => (end, Exit::PoweredOff),
        end => (end, Exit::Died { status: format!("{end:?}"), output: console.clone() }),
    };
    // QEMU may be ended in the middle of a line.
    let whole = events.rfind('\n').map_or("", |end| &events[..=end]);
    let events = events::in_order(events::parse_lines::<Event>(whole)?);
    Ok(Nested { outcome: RunOutcome { events, truth, serial, exit }, console, end })
}

/// Runs guests in QEMU with KVM, one after the other, each a machine of its own.
///
/// What they write to their serial port is put together in the first outlet.
///
/// # Errors
/// If L0 cannot be run.
pub fn run_guests(system: &System, guests: &[&str], options: &str, step: &Step) -> Result<Left> {
    let root = cache::ensure()?;
    let directory = Directory::new()?;
    let qemu = Qemu::Cache(root.clone());
    let mut images = Vec::new();
    let mut programs = Vec::new();
    for guest in guests {
        let image = system.guest(guest)?;
        let mut command = qemu.command();
        command
            .args(["-accel", "kvm", "-cpu", "host", "-m", &GUEST_MIB.to_string()])
            .args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"])
            .args(["-chardev", &format!("file,id=serial,path={SERIAL},append=on")])
            .args(["-serial", "chardev:serial"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
            .arg(image);
        programs.push((directory.path().to_owned(), words(&command)));
        images.push(image.to_owned());
    }
    Linux {
        files: files(&root, images)?,
        outlets: [SERIAL, EVENTS].map(|name| directory.file(name)),
        programs,
        ..linux(options)
    }
    .run(step)
}

/// L0 as all have it.
fn linux(options: &str) -> Linux {
    Linux {
        memory_mib: MEMORY_MIB,
        ips: IPS,
        options: options.to_owned(),
        kvm: String::new(),
        files: BTreeSet::new(),
        outlets: [const { PathBuf::new() }; OUTLETS],
        programs: Vec::new(),
        timeout: TIMEOUT,
    }
}

/// QEMU's files, and more.
fn files(root: &Root, more: impl IntoIterator<Item = PathBuf>) -> Result<BTreeSet<PathBuf>> {
    let mut files = program_files(root, "usr/bin/qemu-system-x86_64")?;
    files.extend(QEMU_FILES.map(|file| root.path().join(file)));
    files.extend(more);
    Ok(files)
}

/// A command's words.
fn words(command: &Command) -> Vec<String> {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    words.map(|word| Path::new(word).display().to_string()).collect()
}
