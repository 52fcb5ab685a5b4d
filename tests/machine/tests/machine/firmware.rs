//! One disk for all firmware: it boots by a BIOS and by UEFI, on little and on much memory, from a stick and from an
//! internal disk; people see on the screen what goes wrong, and find it on the stick afterwards.

use std::fs;
use std::io::{Cursor, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{check_guest, check_orderly, find_guest, make, system};
use machine_tests::{Disk, check, check_eq, run, sector, trial};
use xtask::bare::root;
use xtask::config::{Setup, Source};
use xtask::events::Body;
use xtask::firmware::Firmware;
use xtask::guests::{Guest, Situation};
use xtask::machine::{Accelerator, DiskBus, Emulator, Exit, MachineConfig};
use xtask::monitor::QemuControl;
use xtask::stick;
use xtask::topology::Topology;

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("firmware::spcr_names_the_port_of_the_log", spcr),
        trial("firmware::uefi::two_cpus", || runs(Firmware::Uefi, 256, 2.into())),
        trial("firmware::a_controlled_machine_is_reset", reset),
        trial("firmware::disks_do_not_tell_where_they_were_built", nameless),
    ];
    for (name, firmware) in [("bios", Firmware::Bios), ("uefi", Firmware::Uefi)] {
        let name = |what: &str| format!("firmware::{name}::{what}");
        trials.push(trial(name("guests_run_with_6_gib"), move || runs(firmware, 6144, 1.into())));
        trials.push(trial(name("a_refusal_on_the_screen_and_on_the_stick"), move || {
            refused_on_stick(firmware)
        }));
        trials.push(trial(name("a_refusal_with_6_gib"), move || refused_with(firmware, 6144)));
    }
    trials.push(trial("firmware::bios::guests_run", || runs(Firmware::Bios, 256, 1.into())));
    for (name, damage, says) in [
        ("no_kernel", Damage::Remove("unsplit/kernel.elf"), "kernel.elf"),
        ("no_configuration", Damage::Remove("hv.toml"), "hv.toml"),
        ("damaged_kernel", Damage::Flip("unsplit/kernel.elf"), "damaged"),
    ] {
        for (kind, firmware) in [("bios", Firmware::Bios), ("uefi", Firmware::Uefi)] {
            trials.push(trial(format!("firmware::{kind}::stick_with_{name}"), move || {
                damaged(firmware, damage, says)
            }));
        }
    }
    trials
}

fn controls() -> Result<&'static Guest> {
    find_guest("controls")
}

/// The disk of all these tests: a machine that runs it stays on at the end.
fn disk() -> Result<Disk> {
    let guest = controls()?;
    let Guest { name, memory_mib, .. } = guest;
    let config = format!(
        "sld = \"warn\"\n[[vm]]\nname = \"{name}\"\nimage = \"guests/{name}\"\nmemory_mib = {memory_mib}\n"
    );
    let images = vec![(format!("guests/{name}"), Source::Registered(name))];
    let disk = Disk::new()?;
    system()?.disk(&Setup { config, images }, disk.path())?;
    Ok(disk)
}

/// The same sources give the same disk in every directory, and so a machine that does the same.
fn nameless() -> Result<()> {
    let disk = fs::read(disk()?.path())?;
    for name in [&*root().to_string_lossy(), "/registry/src/"] {
        let found = disk.windows(name.len()).any(|bytes| bytes == name.as_bytes());
        ensure!(!found, "{name} is in it");
    }
    // They are there under other names.
    ensure!(disk.windows(10).any(|bytes| bytes == b"/packages/"), "no package's source is named");
    Ok(())
}

fn machine(firmware: Firmware) -> MachineConfig {
    MachineConfig { firmware, ..MachineConfig::default() }
}

fn without_vtx(firmware: Firmware) -> MachineConfig {
    MachineConfig { emulator: Emulator::Qemu(Accelerator::Tcg), ..machine(firmware) }
}

/// Guests run to their ends.
fn runs(firmware: Firmware, memory_mib: u32, cpus: Topology) -> Result<()> {
    let (_, config) = make(Situation::Warn);
    let config = MachineConfig { firmware, memory_mib, cpus, ..config };
    let outcome = run(&disk()?, config)?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::Stayed)?;
    check_orderly(&outcome)?;
    check_guest(&outcome, controls()?, Situation::Warn)?;
    let booted = outcome.events.iter().find_map(|event| match &event.body {
        Body::Boot { firmware, cpus, .. } => Some((firmware.as_str(), u64::from(*cpus))),
        _ => None,
    });
    check_eq(&outcome, "firmware and CPUs", booted, Some((name_of(firmware), cpus.cpus())))
}

/// As the event `boot` calls it.
fn name_of(firmware: Firmware) -> &'static str {
    match firmware {
        Firmware::Bios => "bios",
        Firmware::Uefi => "uefi",
    }
}

/// The hypervisor comes up, but cannot run there.
fn refused_with(firmware: Firmware, memory_mib: u32) -> Result<()> {
    let outcome = run(&disk()?, MachineConfig { memory_mib, ..without_vtx(firmware) })?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::Stayed)?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::Refused { why } => Some(why.as_str()),
        _ => None,
    });
    check(&outcome, why.is_some_and(|why| why.contains("no VT-x")), "it does not say why")
}

/// What a person does where the hypervisor does not run: reads the screen, presses a key, takes the stick to
/// another machine.
fn refused_on_stick(firmware: Firmware) -> Result<()> {
    const WHY: &str = "no VT-x";
    let disk = disk()?;
    let config =
        MachineConfig { image: disk.path().to_owned(), bus: DiskBus::Usb, ..without_vtx(firmware) };
    let mut machine = QemuControl::start(&config)?;
    machine.wait_for_serial(WHY, 1)?;
    let red = machine.wait_for_screen("why it does not run, in red", |picture| {
        let text = picture.text();
        let colours = text.unbroken().colours_of(WHY);
        (!colours.is_empty()).then(|| (colours.iter().all(|colour| colour.is_red()), text))
    })?;
    ensure!(red.0, "{WHY:?} is not in red:\n{}", red.1);
    let refused = |event: &xtask::events::Event| matches!(event.body, Body::Refused { .. });
    ensure!(machine.events()?.iter().any(refused), "no event tells of it");

    machine.press("a")?;
    machine.wait_for_serial("unsplit/log.txt", 1)?;
    let report = stick::report_of(&machine.quit()?.disk())?;
    ensure!(report.contains(WHY), "the report does not say why:\n{report}");
    ensure!(report.contains("QEMU"), "the report does not name the CPU:\n{report}");
    Ok(())
}

/// A machine whose firmware names a third serial port as its console.
fn spcr() -> Result<()> {
    const PORT: u16 = 0x3e8;
    const FILE: &str = "console.txt";
    let table = Disk::with(&spcr_table(PORT))?;
    let disk = disk()?;
    let config = MachineConfig {
        image: disk.path().to_owned(),
        qemu_arguments: [
            "-acpitable",
            &format!("file={}", table.path().display()),
            "-chardev",
            &format!("file,id=console,path={FILE}"),
            "-device",
            &format!("isa-serial,chardev=console,iobase={PORT:#x},irq=5,index=2"),
        ]
        .map(str::to_owned)
        .to_vec(),
        ..without_vtx(Firmware::Bios)
    };
    let mut machine = QemuControl::start(&config)?;
    machine.wait_for_text(FILE, "no VT-x")
}

/// ACPI's Serial Port Console Redirection table, revision 2: a 16550 at an I/O port, 115200 baud.
fn spcr_table(port: u16) -> Vec<u8> {
    const LENGTH: u8 = 80;
    let mut table = vec![0; LENGTH.into()];
    table[..4].copy_from_slice(b"SPCR");
    table[4] = LENGTH;
    table[8] = 2;
    table[10..16].copy_from_slice(b"TESTER");
    // Interface type 0 is the 16550.
    table[36] = 0;
    // A generic address: I/O space, 8 bits, no offset, accessed by bytes.
    table[40..44].copy_from_slice(&[1, 8, 0, 1]);
    table[44..46].copy_from_slice(&port.to_le_bytes());
    // 7 is 115200 baud; no parity, one stop bit.
    table[58..61].copy_from_slice(&[7, 0, 1]);
    // No PCI device.
    table[64..68].fill(0xff);
    table[9] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    table
}

#[derive(Clone, Copy)]
enum Damage {
    Remove(&'static str),
    Flip(&'static str),
}

/// A stick on which something is wrong: the loader says so and stops.
fn damaged(firmware: Firmware, damage: Damage, says: &str) -> Result<()> {
    let disk = disk()?;
    change(disk.path(), |root| {
        match damage {
            Damage::Remove(file) => root.remove(file)?,
            Damage::Flip(name) => {
                let mut file = root.open_file(name)?;
                let mut byte = [0];
                file.seek(SeekFrom::Start(0x4321))?;
                file.read_exact(&mut byte)?;
                file.seek(SeekFrom::Start(0x4321))?;
                file.write_all(&[byte[0] ^ 1])?;
            }
        }
        Ok(())
    })?;
    let outcome = run(&disk, without_vtx(firmware))?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::LoaderStopped)?;
    check(&outcome, outcome.serial.contains(says), &format!("it does not say {says:?}"))
}

/// Where the stick's file system begins.
const VOLUME: usize = 2048 * 512;

type Root<'a, 'b> = fatfs::Dir<'a, Cursor<&'b mut [u8]>>;

/// Changes the files of a stick.
fn change(disk: &Path, change: impl FnOnce(&Root<'_, '_>) -> Result<()>) -> Result<()> {
    let mut image = fs::read(disk)?;
    let volume = image.get_mut(VOLUME..).context("the disk has no place for a file system")?;
    let volume = fatfs::FileSystem::new(Cursor::new(volume), fatfs::FsOptions::new())?;
    change(&volume.root_dir())?;
    volume.unmount()?;
    Ok(fs::write(disk, image)?)
}

/// The machine layer itself: what is on the screen, and a reset.
fn reset() -> Result<()> {
    let disk = Disk::with(&sector::disk(sector::silent()))?;
    let config = MachineConfig {
        image: disk.path().to_owned(),
        timeout: Duration::from_secs(30),
        ..without_vtx(Firmware::Bios)
    };
    let mut machine = QemuControl::start(&config)?;
    machine.wait_for_serial("S", 1)?;
    // What the BIOS says is still there.
    ensure!(!machine.screen()?.is_blank(), "the screen is empty");
    ensure!(machine.press("no-such-key").is_err(), "there is a key with an odd name");
    machine.reset()?;
    machine.wait_for_serial("S", 2)?;
    let left = machine.quit()?;
    ensure!(fs::read(left.disk())? == fs::read(disk.path())?, "the disk has changed");
    Ok(())
}
