"""Words for the keys of S-NIAH: an adjective and a noun, joined by a hyphen."""

_ADJECTIVES = """ able absent acid amber ample ancient angry arctic autumn awake bare basic bitter blank
bleak blunt bold brave brief bright brisk broad bronze busy calm careful cheap civil clean clear clever
close cloudy coarse cold common copper cosy crisp cruel curious curved daily damp dark dear deep dense dim
distant dizzy dry dull dusty eager early earnest easy empty equal even exact faint fair famous fancy fast
fierce final firm flat fluent fond formal fragile frank free fresh frosty gentle giant glad golden grand
grave grey hollow honest humble humid idle icy ideal jolly keen kind large late lazy lean level light lively
local lonely long loud loyal lucky magenta mellow merry mild misty modern modest muddy narrow native neat
nervous noble noisy nordic odd olive orange pale patient plain polite proud pure quick quiet rapid rare
ready recent rigid ripe robust rough round royal rural rustic salty scarlet secret sharp shiny short shy
silent silver simple sleepy slim slow small smooth sober soft solar solid sour spare steady steep stern
stiff strange strict strong sturdy subtle sudden sunny swift tall tame tender thick thin tidy tiny tough
tranquil urban useful vague vast violet vivid warm wary weak wide wild windy wise witty wooden young zealous
"""

_NOUNS = """ acorn actor album almond anchor ankle anvil apron arch armor arrow atlas attic badge bagel
bamboo banjo barrel basin basket beacon beetle bell bench berry bishop blanket bottle boulder branch bread
brick bridge broom brush bucket button cabin cactus camel candle canoe canvas captain carpet carrot castle
cavern cedar cellar chapel cherry chimney circle clay cliff clock clover coast cobweb collar comet compass
copper coral cotton crayon creek cricket crown cushion dagger daisy desert diary dolphin donkey dragon drum
eagle easel elbow ember engine falcon feather fence ferry fiddle field flute forest fossil fountain fox
garlic gate glacier glove goat granite grape hammer harbor harp hatch helmet heron hinge honey hornet island
ivory jacket jaguar jewel jungle kettle kite knight ladder lagoon lamp lantern lemon library lizard locket
lumber magnet mango mantle maple marble market meadow melon mill mirror monkey mosaic mountain museum
mustard napkin needle nest oasis ocean olive onion orchard otter oven owl paddle palace panda parrot pebble
pencil pepper piano pigeon pillow pine planet plum pocket pony potato prism pumpkin puzzle quarry quilt
rabbit raft raven ribbon river robin rocket saddle salmon sandal saucer shadow shelf shovel slipper sparrow
spider spoon squirrel stable statue summit table tavern teapot temple thimble thunder tiger timber tower
trumpet tulip tunnel turtle valley velvet village violin walnut walrus whale wheel whistle willow window
wizard yarn zebra """

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
