//! What people get wrong is named, with what to do about it, and costs the other VMs nothing.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use boot::disk::{SECTOR, Table};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot, find_guest, system};
use machine_tests::{Disk, check, check_eq, run, trial};
use xtask::config::{Setup, Source};
use xtask::events::Body;
use xtask::guests::SUCCESS;
use xtask::image::Geometry;
use xtask::machine::{Exit, MachineConfig, RunOutcome};

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![
        trial("input::a_vm_that_cannot_start_is_named_and_the_others_run", vms),
        trial("input::a_refused_guest_state_is_named_by_field", guest_state),
        trial("input::too_little_memory_is_told_so", little_memory),
    ];
    for (name, config, says) in [
        ("unknown_mode", "sld = \"loud\"\n", "use off, warn, step, emulate, ratelimit=N"),
        ("unknown_key", "sld = \"warn\"\ncolour = 1\n", "colour"),
        ("no_vm", "sld = \"warn\"\n", "nothing to run"),
        ("no_toml", "sld = ", "line 1"),
    ] {
        trials.push(trial(format!("input::configuration_with_{name}"), move || {
            let config = match name {
                "no_vm" => config.to_owned(),
                _ => format!("{config}{}", vm("good", "guests/controls", 8, "")),
            };
            refused(&setup(config, vec![])?, says)
        }));
    }
    for (name, damage, says) in [
        ("loader", Damage::Loader, "the loader is damaged"),
        ("kernel", Damage::Kernel, "unsplit/kernel.elf is damaged"),
        ("file_system", Damage::FileSystem, "the file system is damaged"),
        ("configuration", Damage::NoConfiguration, "there is no hv.toml on the stick"),
        ("end", Damage::CutOff, "the disk image is truncated"),
    ] {
        trials
            .push(trial(format!("input::disk_with_damaged_{name}"), move || damaged(damage, says)));
    }
    trials
}

fn vm(name: &str, image: &str, memory_mib: u32, more: &str) -> String {
    format!("[[vm]]\nname = \"{name}\"\nimage = \"{image}\"\nmemory_mib = {memory_mib}\n{more}")
}

/// `hv.toml` with the guest `controls` and these files beside it.
fn setup(config: String, files: Vec<(&str, PathBuf)>) -> Result<Setup> {
    let controls = find_guest("controls")?;
    let mut images = vec![("guests/controls".to_owned(), Source::Registered(controls.name))];
    images.extend(files.into_iter().map(|(path, file)| (path.to_owned(), Source::File(file))));
    Ok(Setup { config, images })
}

fn why_refused<'a>(outcome: &'a RunOutcome, name: &str) -> Option<&'a str> {
    outcome.events.iter().find_map(|event| match &event.body {
        Body::VmRefused { vm, why } if vm == name => Some(why.as_str()),
        _ => None,
    })
}

fn good_has_succeeded(outcome: &RunOutcome) -> Result<()> {
    let status = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, status, .. } if vm == "good" => *status,
        _ => None,
    });
    check_eq(outcome, "status of the good VM", status, Some(u32::from(SUCCESS)))?;
    check_eq(outcome, "end", &outcome.exit, &Exit::Stayed)
}

fn vms() -> Result<()> {
    let whole = fs::read(system()?.guest("controls")?)?;
    let (junk, half) = (Disk::with(b"MZ, this is no ELF file")?, Disk::with(&whole[..1000])?);
    let cases = [
        ("junk", "guests/junk", 8, "", "unknown guest format"),
        ("half", "guests/half", 8, "", "damaged ELF image"),
        ("nowhere", "guests/nowhere", 8, "", "no file `guests/nowhere`"),
        ("huge", "guests/controls", 4096, "", "too little memory"),
        ("laxer", "guests/controls", 8, "policy = \"warn\"\n", "use emulate or fatal"),
    ];
    let mut config = "sld = \"fatal\"\n".to_owned();
    for (name, image, memory, more, _) in cases {
        config += &vm(name, image, memory, more);
    }
    config += &vm("good", "guests/controls", 8, "");
    let files =
        vec![("guests/junk", junk.path().to_owned()), ("guests/half", half.path().to_owned())];
    let outcome = boot(&setup(config, files)?, MachineConfig::default())?;
    for (name, .., says) in cases {
        let why = why_refused(&outcome, name).unwrap_or_default();
        check(&outcome, why.contains(says), &format!("{name} says {why:?}, not {says:?}"))?;
        check(&outcome, outcome.serial.contains(why), "the first serial port does not say why")?;
    }
    good_has_succeeded(&outcome)
}

fn guest_state() -> Result<()> {
    let broken = "vmcs = { GUEST_RFLAGS = 0, GUEST_TR_LIMIT = -1 }\n";
    let config = format!(
        "sld = \"warn\"\n{}{}",
        vm("broken", "guests/controls", 8, broken),
        vm("good", "guests/controls", 8, "")
    );
    let outcome = boot(&setup(config, vec![])?, MachineConfig::default())?;
    for field in ["GUEST_RFLAGS = 0x0", "GUEST_TR_LIMIT = 0xffffffff"] {
        check(&outcome, outcome.serial.contains(field), &format!("{field} is not named"))?;
    }
    let reason = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmEnd { vm, reason, .. } if vm == "broken" => Some(reason.as_str()),
        _ => None,
    });
    check_eq(&outcome, "end of the broken VM", reason, Some("invalid state"))?;
    good_has_succeeded(&outcome)
}

fn refused(setup: &Setup, says: &str) -> Result<()> {
    let outcome = boot(setup, MachineConfig::default())?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::Refused { why } => Some(why.as_str()),
        _ => None,
    });
    let named = why.is_some_and(|why| why.contains(says) && outcome.serial.contains(why));
    check(&outcome, named, &format!("says {why:?}, not {says:?}"))?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::Stayed)
}

fn little_memory() -> Result<()> {
    let config = format!("sld = \"warn\"\n{}", vm("good", "guests/controls", 8, ""));
    let machine = MachineConfig { memory_mib: 8, ..MachineConfig::default() };
    let outcome = boot(&setup(config, vec![])?, machine)?;
    check(&outcome, outcome.serial.contains("memory"), "memory is not named")?;
    let ended = matches!(outcome.exit, Exit::PoweredOff | Exit::Stayed | Exit::LoaderStopped);
    check(&outcome, ended, "the machine hung")
}

#[derive(Clone, Copy)]
enum Damage {
    /// One bit of what the boot record loads is another one.
    Loader,
    /// One bit of the kernel is another one.
    Kernel,
    /// The partition with the files begins with zeros.
    FileSystem,
    /// `hv.toml` has another name.
    NoConfiguration,
    /// The last third of the disk is missing.
    CutOff,
}

/// Boots a disk that is not as it was written.
fn damaged(damage: Damage, says: &str) -> Result<()> {
    let config = format!("sld = \"warn\"\n{}", vm("good", "guests/controls", 8, ""));
    let disk = Disk::new()?;
    system()?.disk(&setup(config, vec![])?, disk.path())?;
    let mut image = fs::read(disk.path())?;
    let find = |marker: &[u8]| {
        let mut windows = image.windows(marker.len());
        let at = windows.position(|window| window == marker);
        at.with_context(|| format!("{marker:?} is not on the disk"))
    };
    let loader = find(b"UNSPLIT2")?;
    match damage {
        Damage::Loader => image[loader + 0x1000] ^= 1,
        Damage::Kernel => {
            // Guests are ELF files too, without this section.
            let kernel = find(b"\0.bootloader-config\0")?;
            image[kernel] ^= 1;
        }
        Damage::FileSystem => {
            let table = image[loader..][..Table::SIZE].try_into()?;
            let table = Table::decode(table).context("no table")?;
            image[table.partition_lba as usize * SECTOR..][..SECTOR].fill(0);
        }
        Damage::NoConfiguration => {
            // In the entry that holds its long name.
            let name = find(b"h\0v\0.\0t\0o\0")?;
            image[name] = b'x';
        }
        Damage::CutOff => {
            let cylinder = Geometry { cylinders: 1 }.bytes() as usize;
            image.truncate(image.len() / cylinder * 2 / 3 * cylinder);
        }
    }
    fs::write(disk.path(), &image)?;
    let outcome = run(&disk, MachineConfig::default())?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::LoaderStopped)?;
    check(&outcome, outcome.serial.contains(says), &format!("the loader does not say {says:?}"))
}
