//! The ramdisk: an archive with room for the kernel's log, the configuration and the guests' images.

use arrayvec::ArrayVec;
use boot::{archive, log, stick};
use x86_64::PhysAddr;

use crate::{
    console::say,
    failure::{Failure, Path},
    files::{self, Reader, Stick},
    memory,
};

/// A guest's image.
struct Image {
    path: Path,
    bytes: u64,
}

/// Makes it where the log is found again after a restart. Its physical address and size in bytes.
pub fn make(stick: &mut Stick) -> Result<(PhysAddr, u64), Failure> {
    let mut config = stick.open_file(stick::CONFIG)?;
    let mut images = ArrayVec::<Image, { stick::MAX_FILES }>::new();
    stick.for_each_image(|name, bytes| {
        let mut path = Path::new();
        [stick::GUESTS, "/", name]
            .into_iter()
            .try_for_each(|part| path.try_push_str(part))
            .map_err(|_| Failure::BadName)?;
        images.try_push(Image { path, bytes }).map_err(|_| Failure::TooManyFiles)
    })?;

    let sizes = images.iter().map(|image| image.bytes).chain([log::BYTES, config.bytes]);
    let size = sizes.map(archive::room).sum::<u64>() + archive::END;
    let memory = memory::allocate_lasting("the ramdisk", size)?;
    say(format_args!(
        "reading {} and {} ({} KiB)",
        stick::CONFIG,
        stick::GUESTS,
        size.div_ceil(1024)
    ));
    let at = memory::address(memory);
    let mut archive = archive::Writer::new(memory);
    archive.file(log::NAME, log::BYTES)?;
    add(&mut archive, stick::CONFIG, &mut config)?;
    for image in &images {
        add(&mut archive, &image.path, &mut stick.open_file(&image.path)?)?;
    }
    Ok((at, archive.finish()?))
}

fn add(archive: &mut archive::Writer<'_>, path: &str, file: &mut Reader) -> Result<(), Failure> {
    // Names fit; there is no room for what was larger than its directory entry said.
    let place =
        archive.file(path, file.bytes).map_err(|_| Failure::WrongSize(files::shown(path)))?;
    file.read(place)
}
