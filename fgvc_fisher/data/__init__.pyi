from .batches import read_batch as read_batch
from .archive import untar_aircraft as untar_aircraft
from .tables import (
    read_aircraft as read_aircraft,
    read_image_folder as read_image_folder,
    read_pictures as read_pictures,
    read_table as read_table,
    read_folder as read_folder,
    pick_split as pick_split,
    hold_out as hold_out,
    take_fraction as take_fraction,
    class_weights as class_weights,
)
from .forms import read_data as read_data
from .check import check_aircraft as check_aircraft, without_duplicates as without_duplicates
from .pictures import cache_images as cache_images
from .loaders import (
    picture_dl as picture_dl,
    aircraft_dls as aircraft_dls,
    folder_dls as folder_dls,
    table_dls as table_dls,
)
